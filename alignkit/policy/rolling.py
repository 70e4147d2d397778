"""Runs of a pipeline's loop with our solver: whole, up to a step, or from a step on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from alignkit.errors import RecipeError
from alignkit.flow.path import velocity_from, x0_from_velocity
from alignkit.flow.plan import Plan
from alignkit.flow.transition import Noise, Reduce, Transition, draw_noise, renoised
from alignkit.policy.conditioning import Conditioning
from alignkit.policy.driver import Driver
from alignkit.policy.onestep import session_from
from alignkit.policy.session import Visit
from alignkit.types import Rollouts, Steer, Step, StepRecord

Poll = Callable[[], None]


def prediction_of(driver: Driver, output: torch.Tensor) -> torch.Tensor:
    """What a pipeline hands to its scheduler, float32, in alignkit's sense of sigma."""
    return output.float() * driver.grid.sign()


def velocity_at(driver: Driver, prediction: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """dx/dsigma (B, ...) float32 of the denoiser's prediction at latents `x`."""
    return velocity_from(driver.grid.path, driver.grid.prediction, prediction, x.float(), sigma.to(x.device))


def transition_at(
    driver: Driver,
    v: torch.Tensor,
    x: torch.Tensor,
    index: int,
    cond: Conditioning,
    noise: Noise,
    mask: torch.Tensor | None,
) -> Transition:
    """The Gaussian of step `index` of the grid from latents `x` with velocity `v`."""
    s = cond.sigmas
    return noise.build(driver.grid.path, x.float(), v, float(s[index]), float(s[index + 1]), float(s[1]), mask)


def steps_of(plan: Plan, cond: Conditioning, latents: torch.Tensor | None, stop: int | None) -> range:
    """The steps that run.

    Raises:
        RecipeError: a plan for another grid, a later start without latents, or an end that is not after the start.
    """
    if plan.num_steps != len(cond.timesteps):
        raise RecipeError(f"a plan of {plan.num_steps} steps for a grid of {len(cond.timesteps)}")
    if plan.start and latents is None:
        raise RecipeError(
            f"the plan begins at step {plan.start}, and nothing says from where: give `latents` at noise level "
            f"{float(cond.sigmas[plan.start]):.3f}, or a plan with start=0"
        )
    if latents is not None and len(latents) != len(cond):
        raise RecipeError(f"{len(latents)} latents for a conditioning of {len(cond)} samples")
    end = plan.num_steps if stop is None else stop
    if not plan.start < end <= plan.num_steps:
        raise RecipeError(f"stop={stop} must be one of the steps {plan.start + 1}..{plan.num_steps}")
    return range(plan.start, end)


def with_repeats(steps: range, repeats: Mapping[int, int]) -> list[int]:
    """The steps in the order in which they run; step k runs `repeats[k]` times, by default once.

    Raises:
        RecipeError: a number below 1, or a step that does not run.
    """
    wrong = {k: n for k, n in repeats.items() if k not in steps or n < 1}
    if wrong:
        raise RecipeError(f"repeats={wrong}: steps {steps.start}..{steps.stop - 1} run, each at least once")
    return [k for k in steps for _ in range(repeats.get(k, 1))]


def steered(step: Step, steer: Steer | None) -> tuple[Step, torch.Tensor | None]:
    """The step that a run takes instead, and what was added to its velocity (B, ...); None where nothing was, or where
    rows were exchanged.

    The velocity is then the old one plus this number, and not what steering returned, which rounding makes differ: only
    so has the step, scored again, the very mean it was sampled with.
    """
    if steer is None:
        return step, None
    found = steer(step)
    if found is step or found.latents is not step.latents:
        return found, None
    shift = found.velocity - step.velocity
    return replace(found, velocity=step.velocity + shift), shift


@dataclass
class Rolling:
    """One run: its solver, and what it has recorded. `latents` are the current ones in full precision."""

    driver: Driver
    cond: Conditioning
    plan: Plan
    generators: list[torch.Generator]
    reduce: Reduce
    poll: Poll | None
    latents: torch.Tensor
    mask: torch.Tensor | None
    steer: Steer | None = None
    recording: bool = True
    records: list[StepRecord] = field(default_factory=list)
    left: list[int] = field(default_factory=list)

    def run(self, steps: Sequence[int]) -> Rollouts:
        """Run these steps of the loop, in this order, from the current latents; a step that comes again begins from
        its result taken back to its noise level."""
        start, self.left = self.latents, list(steps)

        def on_step(index: int, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if session.visit.pretend:
                return start.to(sample), start.to(sample)
            return self.step(index, output, sample)

        visits = [Visit(k) for k in steps]
        session = session_from(self.driver, start, self.cond, visits, on_step, blend=steps[0] > 0)
        self.driver.run(session, self.cond)
        return Rollouts(self.latents, tuple(self.records), self.cond.sigmas)

    def step(self, index: int, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(next latents, clean estimate) of one step, in the dtype of `sample`; stochastic ones are recorded."""
        if self.poll is not None:
            self.poll()
        x = sample.float()
        if torch.equal(self.latents.to(sample), sample):
            x = self.latents  # full precision, where the pipeline passed our latents on unchanged
        v = velocity_at(self.driver, prediction_of(self.driver, output), x, self.cond.sigmas[index])
        step, shift = steered(self.seen(index, x, v), self.steer)
        transition = step.transition(step.latents, step.velocity)
        self.latents = transition.sample(self.generators) if step.stochastic else transition.mean
        if step.stochastic and self.recording:
            self.record(step, transition, shift)
        x0 = x0_from_velocity(self.driver.grid.path, step.velocity, step.latents, step.sigma)
        self.left.pop(0)
        if self.left and self.left[0] == index:
            eps = draw_noise(self.latents, self.generators)
            self.latents = renoised(self.driver.grid.path, self.latents, step.sigma_next, step.sigma, eps)
        return self.latents.to(sample), x0.to(sample)

    def seen(self, index: int, x: torch.Tensor, v: torch.Tensor) -> Step:
        """Step `index` from latents `x` with velocity `v`, as a steering function sees it."""
        sigmas, noise = self.cond.sigmas, self.plan.noise_at(index)

        def transition(latents: torch.Tensor, velocity: torch.Tensor) -> Transition:
            return transition_at(self.driver, velocity, latents, index, self.cond, noise, self.mask)

        levels = float(sigmas[index]), float(sigmas[index + 1])
        stochastic = index in self.plan.stochastic
        return Step(index, float(self.cond.timesteps[index]), *levels, x, v, stochastic, transition)

    def record(self, step: Step, transition: Transition, shift: torch.Tensor | None) -> None:
        """Keep what training needs to score this step again."""
        log_prob = transition.log_prob(self.latents, reduce=self.reduce)
        levels = (step.index, step.timestep, step.sigma, step.sigma_next)
        scored = (transition.mean, log_prob, self.mask, shift)
        self.records.append(StepRecord(*levels, step.latents, self.latents, *scored))
