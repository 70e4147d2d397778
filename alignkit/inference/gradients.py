"""Guidance by the gradient of a reward: of noised latents (NRG), or of the predicted clean sample (DPS and its kin).

Both change the velocity that the pipeline's own guidance left, `v' = v - w sigma / (1 - sigma) g` for rectified flow
and the same through the path for eps and v models (`flow.guidance.with_score_gradient`). What differs is g:

    NRG                   d r(x, sigma, c) / d x of a reward that knows noise; exact if it is log E[exp(r(x0)) | x]
    DPS through denoiser  d r(decode(x0_hat(x))) / d x, backward through the denoiser (2209.14687)
    DPS through x0        d r(decode(x0_hat)) / d x0_hat times the slope of the denoiser for data of unit variance; no
                          denoiser backward (MPGD 2311.16424, LGD-MC Song et al. 2023)
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from alignkit.errors import RecipeError
from alignkit.flow.guidance import Schedule, Strength, posterior_std, with_x0_change
from alignkit.flow.path import Path, expand_to, x0_from_velocity
from alignkit.flow.transition import draw_noise
from alignkit.inference.judges import Judges
from alignkit.inference.method import Calls, Method, best_of, one_of
from alignkit.inference.saving import recomputing
from alignkit.inference.steering import (
    Through,
    carried_to_latents,
    climbed,
    noisy_reward_steering,
    noted,
    require_finite,
    smoothed_gradient,
)
from alignkit.inference.task import Found, Task
from alignkit.types import Steer, Step

Jacobian = Literal["gaussian", "identity"]


@dataclass(frozen=True)
class GradientGuidance(Method):
    """What both methods can be told.

    Attributes:
        weight, start, stop, schedule, clip, normalise, sigma_singular: see `Strength`.
        gradient_batch: samples that are differentiated at once, 1 for the least memory; None: all that are denoised
            at once.
    """

    weight: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    schedule: Schedule = "constant"
    clip: float | None = None
    normalise: bool = False
    sigma_singular: float = 0.999
    gradient_batch: int | None = None

    def __post_init__(self) -> None:
        _ = self.strength
        if self.gradient_batch is not None and self.gradient_batch < 1:
            raise RecipeError(f"gradient_batch={self.gradient_batch}; expected at least 1, or None for all at once")

    @property
    def strength(self) -> Strength:
        """How much, and when."""
        return Strength(**{field.name: vars(self)[field.name] for field in fields(Strength)})

    def check_rewards(self, judges: Judges) -> None:
        judges.require_steering(self.name)

    def guided(self, sigmas: Tensor) -> list[int]:
        """The steps of a grid (num_steps + 1,) that are guided."""
        n = len(sigmas) - 1
        return [k for k in range(n) if self.strength.at(k, n, float(sigmas[k])) != 0]


def _even(num_steps: int) -> Tensor:
    """A grid of rectified flow: it begins at noise level 1. Grids that begin below it have one guided step more."""
    return torch.linspace(1.0, 0.0, num_steps + 1)


@dataclass(frozen=True)
class NRG(GradientGuidance):
    """Noisy reward guidance (Flow-NRG, VideoAlign 2501.13918): noise-aware rewards, one denoiser call a step.

    1. At every step the reward is asked about the noised latents, and differentiated.
    2. The velocity, after the pipeline's own guidance, is changed by `- weight sigma / (1 - sigma)` times the gradient.
    3. A budget of n draws n guided samples and keeps the one with the largest total reward.

    The weights of the rewards are those of the call. The paper's weight of 100 belongs to its own reward. A trained
    reward knows least next to noise, where the factor is largest: start=0.2, or a clip, keeps samples with the data
    (claim 13 of recipes/mixture).
    """

    name: ClassVar[str] = "nrg"

    def check_rewards(self, judges: Judges) -> None:
        super().check_rewards(judges)
        blind = [name for name in judges.steering if name not in judges.noisy]
        if blind:
            dps = "'dps', which follows gradients through the predicted clean sample, or "
            raise RecipeError(
                f"method 'nrg' asks its rewards about noised latents at every step, and {', '.join(blind)} knows only "
                "finished samples: what it says of noise misleads. Use method="
                f"{dps if judges.differentiable else ''}'fk' or 'best_of_n', which take any reward; or train a "
                "noise-aware reward (alignkit run sign_noisy shows how)"
            )

    def calls(self, num_steps: int, budget: float) -> Calls:
        guided = len(self.guided(_even(num_steps)))
        one = Calls(denoiser=num_steps, head=guided, head_gradients=guided, decodes=1, rewards=1)
        return one * int(budget)

    def draw(self, task: Task, cond: Any, rng: list[torch.Generator]) -> Found:
        def steering(rows: Any) -> Steer:
            own = (self.strength, self.gradient_batch, task.note)
            return noisy_reward_steering(task.reward_at, rows, task.policy.path, len(rows.timesteps), *own)

        return best_of(task, cond, rng, int(task.budget), steering=steering)


@dataclass(frozen=True)
class DPS(GradientGuidance):
    """Guidance by a differentiable reward of the predicted clean sample (DPS 2209.14687 and what followed).

    1. At every step the clean estimate x0_hat is decoded, scored and differentiated.
    2. The gradient with respect to x0_hat becomes one with respect to the latents (`through`), and changes the
       velocity as noisy reward guidance does, by `- weight sigma / (1 - sigma)` times it.
    3. A budget of n draws as many guided samples as it pays and keeps the one with the largest total reward.

    It is not exact at any weight: a clean reward of x0_hat is not the reward of what the sample may still become.

    Attributes:
        through: "x0" needs no denoiser backward (MPGD 2311.16424); "denoiser" takes a second denoiser call a step,
            with its backward (DPS).
        jacobian: of "x0", what stands for d x0_hat / d x: "gaussian", alpha / (alpha^2 + sigma^2), which it is for data
            of unit variance, or "identity".
        averages: LGD-MC: the reward is averaged over so many x0_hat + s z, s the spread of x0 given the latents for
            data of unit variance; 1: of x0_hat itself. The z of a step are the same for all samples. The average is
            of exp(weight r); of exp(r) with `normalise`, where the weight is no exponent but a share of a norm.
        backward_steps, backward_lr: universal guidance (2302.07121): x0_hat itself also takes so many gradient steps.
        repeats: time travel (FreeDoM 2303.09833): how often the steps between the shares `repeat_start` and
            `repeat_stop` run, with fresh noise in between; each costs a denoiser call.
        checkpointing: compute activations again at backward, in the decoder (and the denoiser, through it), as far as
            their classes can.
    """

    name: ClassVar[str] = "dps"

    through: Through = "x0"
    jacobian: Jacobian = "gaussian"
    averages: int = 1
    backward_steps: int = 0
    backward_lr: float = 0.1
    repeats: int = 1
    repeat_start: float = 0.2
    repeat_stop: float = 0.5
    checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("through", self.through, get_args(Through))
        one_of("jacobian", self.jacobian, get_args(Jacobian))
        for name, least in (("averages", 1), ("backward_steps", 0), ("repeats", 1)):
            if vars(self)[name] < least:
                raise RecipeError(f"{name}={vars(self)[name]} must be at least {least}")
        if not 0.0 <= self.repeat_start < self.repeat_stop <= 1.0:
            raise RecipeError(
                f"repeat_start={self.repeat_start}, repeat_stop={self.repeat_stop} are shares of the steps: expected "
                "0 <= repeat_start < repeat_stop <= 1"
            )

    def check_rewards(self, judges: Judges) -> None:
        judges.require_differentiable(self.name)

    def check(self, task: Task) -> None:
        super().check(task)
        self.samples(_even(task.num_steps) if task.sigmas is None else task.sigmas, task.budget)

    def guided(self, sigmas: Tensor) -> list[int]:
        n = len(sigmas) - 1
        acts = self.weight != 0 or self.backward_steps > 0
        return [k for k in range(n) if acts and self.strength.share(k, n, float(sigmas[k])) != 0]

    def travels(self, num_steps: int) -> dict[int, int]:
        """How often each step runs, where it is not once."""
        inside = [k for k in range(num_steps) if self.repeat_start <= k / num_steps < self.repeat_stop]
        return dict.fromkeys(inside, self.repeats) if self.repeats > 1 else {}

    def runs(self, sigmas: Tensor) -> tuple[int, int]:
        """(how many steps run, how many of them are guided), time travel counted."""
        travels = self.travels(len(sigmas) - 1)
        own, guided = range(len(sigmas) - 1), self.guided(sigmas)
        return sum(travels.get(k, 1) for k in own), sum(travels.get(k, 1) for k in guided)

    def cost(self, sigmas: Tensor) -> int:
        """Denoiser calls of one sample."""
        steps, guided = self.runs(sigmas)
        return steps + (guided if self._second_call else 0)

    @property
    def _second_call(self) -> bool:
        return self.through == "denoiser" and self.weight != 0

    def calls(self, num_steps: int, budget: float) -> Calls:
        sigmas = _even(num_steps)
        guided = self.runs(sigmas)[1]
        seen = guided * ((self.averages if self.weight != 0 else 0) + self.backward_steps)
        one = Calls(
            denoiser=self.cost(sigmas),
            denoiser_gradients=guided if self._second_call else 0,
            decodes=seen + 1,
            decode_gradients=seen,
            rewards=seen + 1,
        )
        return one * self.samples(sigmas, budget)

    def samples(self, sigmas: Tensor, budget: float) -> int:
        """How many samples of a prompt a budget pays.

        Raises:
            RecipeError: none.
        """
        cost = self.cost(sigmas) / (len(sigmas) - 1)
        count = int(budget / cost + 1e-9)
        if count < 1:
            raise RecipeError(
                f"budget={budget:g} does not pay one sample of these options, which costs {cost:.2f} plain ones "
                f"(through={self.through!r}, repeats={self.repeats}); give budget={math.ceil(cost)}, or options that "
                "cost less"
            )
        return count

    def draw(self, task: Task, cond: Any, rng: list[torch.Generator]) -> Found:
        count, travels = self.samples(cond.sigmas, task.budget), self.travels(len(cond.timesteps))
        saving = recomputing(task.policy, self.through == "denoiser") if self.checkpointing else nullcontext()
        with saving:
            return best_of(task, cond, rng, count, steering=partial(self.steering, task), repeats=travels)

    def steering(self, task: Task, cond: Any) -> Steer:
        """What steers the samples of `cond`."""
        steps = frozenset(self.guided(cond.sigmas))
        num_steps = len(cond.timesteps)

        def steer(step: Step) -> Step:
            if step.index not in steps:
                return step
            return self.steered(task, cond, step, self.strength.at(step.index, num_steps, step.sigma))

        return steer

    def steered(self, task: Task, cond: Any, step: Step, weight: float) -> Step:
        """One guided step."""
        path, velocity, values = task.policy.path, step.velocity, None
        x0 = x0_from_velocity(path, step.velocity, step.latents, step.sigma)
        if weight != 0:
            offsets = self.offsets(path, step)
            own = (cond, offsets, 1.0 if self.normalise else weight, self.gradient_batch)
            values, gradient = smoothed_gradient(task.reward_of_clean, x0, *own)
            gradient = self.of_latents(task, step, cond, gradient)
            require_finite(gradient, cond, step)
            velocity = self.strength.guided(path, velocity, gradient, step.sigma, weight)
        if self.backward_steps:
            own = (cond, self.backward_steps, self.backward_lr, self.gradient_batch)
            delta = climbed(task.reward_of_clean, x0, *own)
            require_finite(delta, cond, step)
            velocity = with_x0_change(path, velocity, delta, step.sigma)
        return noted(step, velocity, values, task.note)

    def offsets(self, path: Path, step: Step) -> list[Tensor]:
        """Where around the clean estimate the reward is asked, each broadcastable to it."""
        if self.averages == 1:
            return [torch.zeros_like(step.latents[:1])]
        rng = torch.Generator(step.latents.device).manual_seed(step.index)
        spread = expand_to(posterior_std(path, step.sigma), step.latents)
        return [spread * draw_noise(step.latents[:1], rng) for _ in range(self.averages)]

    def of_latents(self, task: Task, step: Step, cond: Any, gradient: Tensor) -> Tensor:
        """The gradient (B, ...) with respect to the latents from that with respect to the clean estimate."""
        if self.through == "x0" and self.jacobian == "identity":
            return gradient
        return carried_to_latents(task, step, cond, gradient, self.through, self.gradient_batch)
