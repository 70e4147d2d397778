"""InstructVideo (2312.12490): reward fine-tuning as editing. Made for videos, it works on images too.

1. Clean samples x0 of P prompts, G of each: from `data`, or drawn now with the deterministic sampler.
2. Noise part of the way: x = alpha x0 + sigma eps at the level with which the sampler enters the last n = `start` D of
   its D = `num_steps` steps; the same level for all frames.
3. n - 1 of these steps without a graph, the last with one: exactly one denoiser call has a gradient (DRaFT-1,
   2309.17400).
4. Decode no frame after the last that the rewards look at in a micro-batch; loss = -(weighted sum of the rewards).
5. Average over samples, clip the gradient, step.

Where pictures of one frame are judged, `Segmental(..., normalised=False)` is the paper's reward: one random frame of
each of four segments (SegVR), weighed exp(-|frame - F / 2|) (TAR); the frames are drawn anew for every sample and
round. Dense rewards drive a generator to still videos, sparse and attenuated ones were found not to. The default of
`Segmental` deviates: its weights sum to 1 for every draw, so that scores are on the image reward's scale.

start=1 begins from pure noise: DRaFT-1. Its own rollout then is the run to be differentiated, so the step before the
last is kept and a round costs one denoiser call per sample beside sampling, at the weights of the round's beginning;
below 1 each sample costs n more. From `data` nothing is sampled and n is all.

Trains the guided output by default, as the paper does; text encoders never.

Deviations from the paper, on purpose: rectified flow and any variance-preserving sampler, on the sampler's own grid
instead of d(i) = T / D (i - 1) + 1; any number of differentiable rewards of pictures, videos or clean latents;
`velocity_beta`, which the paper has not. Pipelines that put known parts into the latents after every step (masks,
given frames) are refused: the steps are taken one by one, where their loop would do so only at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from alignkit.errors import RecipeError
from alignkit.flow.plan import Plan, deterministic
from alignkit.flow.transition import ODE, Transition, reduce_positions
from alignkit.policy import Conditioning
from alignkit.training.experience import Experience
from alignkit.training.matching import noised
from alignkit.training.recipe import Recipe
from alignkit.training.reward_gradient import (
    SEEDS,
    Begun,
    check_differentiable,
    entering_last_step,
    last_step,
    scores_of,
    steps_left,
    without_gradient,
)
from alignkit.types import Noised, Rollouts, Scores, StepRecord, View

if TYPE_CHECKING:
    from alignkit.policy import Policy
    from alignkit.rewards import Weighted
    from alignkit.training.update import Batch


@dataclass(frozen=True)
class Judged(Experience):
    """Samples, and what scores them after they were edited."""

    rewards: Weighted = field(kw_only=True)


@dataclass(frozen=True)
class InstructVideo(Recipe):
    """A run of reward fine-tuning as editing.

    Attributes:
        start: how far a clean sample is noised, as a share of the sampler's steps, in (0, 1]; the paper's tau, found
            best at 0.6. 1: from pure noise, without samples (DRaFT-1).
        velocity_beta: coefficient of the mean squared distance to the reference's velocity at the last step; 0: none.
    """

    learns_from: ClassVar[Literal["rollouts", "samples", "pairs"]] = "samples"

    start: float = 0.6
    velocity_beta: float = 0.0
    num_steps: int = 20

    @property
    def edit_steps(self) -> int:
        """n, the steps that an edited sample goes through."""
        return steps_left(self.start, self.num_steps)

    @property
    def whole(self) -> bool:
        """Whether every step is gone through, from pure noise."""
        return self.edit_steps == self.num_steps

    @property
    def editing_calls(self) -> int:
        """Denoiser calls without a gradient that one sample of a round costs beside sampling."""
        return 0 if self.whole else self.edit_steps - 1

    def validate(self) -> None:
        super().validate()
        if not 0 < self.start <= 1:
            raise RecipeError(f"start={self.start} must be above 0 and at most 1; published: 0.6, and 1 is from noise")
        if self.edit_steps < 1:
            raise RecipeError(
                f"start={self.start} of num_steps={self.num_steps} leaves no step; the smallest that leaves one: "
                f"{1 / self.num_steps:g}"
            )
        if self.whole and self.data is not None:
            raise RecipeError(
                f"start={self.start} begins from pure noise, so nothing of data={self.data!r} would be used; give "
                "prompts instead, or a smaller start"
            )
        if self.velocity_beta < 0:
            raise RecipeError(f"velocity_beta={self.velocity_beta} must be at least 0")
        check_differentiable(self.rewards, type(self).__name__)
        if self.precision == "fp16":
            raise RecipeError(
                "precision='fp16': a reward's gradient overflows in an fp16 decoder; use 'bf16' or 'fp32'"
            )

    def rollout(
        self,
        policy: Policy,
        cond: Conditioning,
        plan: Plan,
        rng: list[torch.Generator],
        group_size: int,
        poll: Callable[[], None],
    ) -> Rollouts:
        """From pure noise the step before the last is kept.

        Raises:
            RecipeError: the pipeline's loop puts known parts into the latents.
        """
        refuse_blends(cond)
        if not self.whole:
            return super().rollout(policy, cond, plan, rng, group_size, poll)
        last = plan.num_steps - 1
        begun = policy.initial_latents(cond, rng)
        x = policy.rollout(cond, plan, rng, latents=begun, stop=last, poll=poll).x0 if last else begun
        rolled = policy.rollout(cond, deterministic(plan.num_steps, start=last), rng, latents=x, poll=poll)
        levels = float(cond.timesteps[last]), float(cond.sigmas[last]), float(cond.sigmas[last + 1])
        record = StepRecord(last, *levels, x, rolled.x0, rolled.x0, torch.zeros(len(x), device=x.device))
        return replace(rolled, steps=(record,))

    def weigh(
        self, scores: Scores, weights: Mapping[str, float], groups: torch.Tensor, features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight 1 for every sample: what is edited is scored afterwards."""
        return torch.ones_like(scores.total), torch.ones_like(scores.total, dtype=torch.bool)

    def completed(self, experience: Experience, rewards: Weighted) -> Experience:
        refuse_blends(experience.cond)
        return Judged(**vars(experience), rewards=rewards)

    def views(self, policy: Policy, experience: Experience, rng: Sequence[torch.Generator]) -> tuple[View, ...]:
        """One noise level for all; sample i depends on `rng[i]` alone."""
        assert isinstance(experience, Judged)
        cond, rollouts = experience.cond, experience.rollouts
        seeds = torch.cat([torch.randint(SEEDS, (1,), generator=one) for one in rng])
        if self.whole:
            (record,) = rollouts.steps
            index, latents, x0 = record.index, record.latents, record.next_latents
            sigma = torch.full((len(x0),), record.sigma, device=x0.device)
            view = Noised(x0, latents, latents, sigma, torch.full_like(sigma, record.timestep))
        else:
            index = self.num_steps - self.edit_steps
            eps = torch.stack([torch.randn(rollouts.x0.shape[1:], generator=one, device=one.device) for one in rng])
            sigma = cond.sigmas[index].float().expand(len(eps))
            timestep = cond.timesteps[index].float().expand(len(eps))
            view = noised(policy, rollouts.x0, eps.to(rollouts.x0), sigma, timestep)
        return (Begun(**vars(view), index=index, rewards=experience.rewards, seeds=seeds),)

    def policy_step(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss (B,) of the edited samples. One without a usable score, its reward having failed or not applying, is 0
        and left out: the others are scaled so that their mean over the batch is the mean over them alone."""
        view, cond = batch.view, batch.cond
        assert isinstance(view, Begun)
        entered = entering_last_step(policy, view.latents, view.index, cond)
        step = last_step(policy, entered, cond)
        scores = scores_of(view.rewards, policy, step.mean, cond, view.seeds, self.reward_device)
        total = scores.total.to(entered.device)
        lost = total.isnan()
        without_gradient(step.mean, lost)
        logs = edited(scores, view.rewards.on_error == "mask")
        loss = -total
        if self.velocity_beta:
            gap = self.velocity_gap(policy, entered, step, cond)
            loss, logs = loss + self.velocity_beta * gap, {**logs, "velocity_gap": gap.detach()}
        scored = len(lost) / (~lost).sum().clamp(min=1)
        loss = torch.where(lost, 0.0, scored * loss)
        if not loss.requires_grad:  # no sample has a score: the gradient is 0 and not missing
            loss = loss + 0.0 * reduce_positions(step.mean, None, "mean")
        return loss, logs

    def velocity_gap(self, policy: Policy, entered: torch.Tensor, step: Transition, cond: Conditioning) -> torch.Tensor:
        """(B,) mean squared distance to the reference's velocity at the last step."""
        with self.compared(policy), torch.no_grad():
            reference = policy.transition(entered, len(cond.timesteps) - 1, cond, ODE).velocity
        assert step.velocity is not None and reference is not None
        return reduce_positions((step.velocity - reference) ** 2, None, "mean")


def refuse_blends(cond: Conditioning) -> None:
    """Raises RecipeError where the pipeline's loop puts known parts into the latents after every step."""
    if isinstance(cond, Conditioning) and cond.layout.blends:
        raise RecipeError(
            "this pipeline puts known parts (a mask, given frames) into the latents after every step of its loop, and "
            "InstructVideo takes its last step without the loop; use GRPO or NFT, which need no reward's gradient"
        )


def edited(scores: Scores, masked: bool) -> dict[str, torch.Tensor]:
    """For the log: scores of the edited samples that have one, and with `masked` the share (B,) that failed."""
    logs: dict[str, torch.Tensor] = {}
    for name, part in scores.parts.items():
        known = part.detach()[part.isfinite()]
        logs |= {f"edited_{name}": known} if len(known) else {}
        logs |= {f"edited_{name}_failed": torch.full((len(part),), scores.failed[name] / len(part))} if masked else {}
    return logs
