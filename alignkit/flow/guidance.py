"""Functions from a velocity to a velocity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from alignkit.errors import RecipeError
from alignkit.flow.path import (
    Path,
    Sigma,
    as_coefficient,
    at_least_float32,
    determinant,
    expand_to,
    score_to_velocity_rate,
)

Schedule = Literal["constant", "rising", "falling"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)


def classifier_free(v_uncond: Tensor, v_cond: Tensor, scale: Sigma) -> Tensor:
    """v_uncond + scale (v_cond - v_uncond), (B, ...); scale is one number or (B,), 1 is unguided."""
    v_uncond, v_cond = at_least_float32(v_uncond), at_least_float32(v_cond)
    return v_uncond + expand_to(scale, v_cond) * (v_cond - v_uncond)


def with_score_gradient(
    path: Path, v: Tensor, gradient: Tensor, sigma: Sigma, weight: float, sigma_singular: float = 1.0
) -> Tensor:
    """The velocity of the density `p(x) exp(weight r(x))`, (B, ...).

    `gradient` is d r / d x at this sigma, (B, ...). Adding g to the score changes eps_hat by -sigma g and,
    at fixed x, x0_hat by sigma^2 g / alpha, so `v' = v - weight sigma (1 - sigma alpha_dot / alpha) g`: for
    rectified flow `v - weight sigma / (1 - sigma) g` (Flow-NRG, VideoAlign 2501.13918). The factor is
    infinite at sigma = 1: steps with sigma at or above `sigma_singular` are left unguided. The reward must
    have been trained on noised latents.
    """
    v = at_least_float32(v)
    return v + weight * velocity_change(path, gradient, sigma, sigma_singular)


def velocity_change(path: Path, gradient: Tensor, sigma: Sigma, sigma_singular: float = 1.0) -> Tensor:
    """What adding `gradient` (B, ...) to the score adds to the velocity, (B, ...); 0 from `sigma_singular` on."""
    gradient = at_least_float32(gradient)
    level = as_coefficient(sigma)
    singular = level >= sigma_singular
    rate = torch.where(singular, 0.0, score_to_velocity_rate(path, torch.where(singular, 0.5, level)))
    return -expand_to(rate, gradient) * gradient


def norms(x: Tensor) -> Tensor:
    """(B,) Euclidean norm of each sample of (B, ...)."""
    return rearrange(x, "b ... -> b (...)").norm(dim=1)


def normalised(change: Tensor, like: Tensor) -> Tensor:
    """`change` (B, ...) with the norm of `like` (B, ...), sample by sample; what is 0 stays 0."""
    size = norms(change)
    return expand_to(torch.where(size > 0, norms(like) / torch.where(size > 0, size, 1.0), 0.0), change) * change


def clipped(change: Tensor, like: Tensor, clip: float) -> Tensor:
    """`change` (B, ...) with a norm of at most `clip` times that of `like` (B, ...), sample by sample."""
    size, most = norms(change), clip * norms(like)
    return expand_to(torch.where(size > most, most / torch.where(size > most, size, 1.0), 1.0), change) * change


def scheduled(schedule: Schedule, progress: float, start: float = 0.0, stop: float = 1.0) -> float:
    """How much of the weight counts when the share `progress` of a run is done, in [0, 1].

    0 outside of `start` <= progress < `stop`. Inside: 1 (`constant`), linearly up to 1 at `stop` (`rising`) or from 1
    at `start` down (`falling`). Guidance that begins late, such as start=0.1, leaves the layout to the generator.
    """
    if schedule not in SCHEDULES:
        raise RecipeError(f"schedule={schedule!r} is not known; expected one of {', '.join(SCHEDULES)}")
    if not start <= progress < stop:
        return 0.0
    done = (progress - start) / (stop - start)
    return {"constant": 1.0, "rising": done, "falling": 1.0 - done}[schedule]


@dataclass(frozen=True)
class Strength:
    """How much a gradient of a reward changes the velocity, and at which steps.

    Attributes:
        weight: w of the density `p(x) exp(w r(x))`, if the reward is the right one at every noise level.
        start, stop: shares of the steps between which there is guidance, in [0, 1].
        schedule: of the weight between them, see `scheduled`.
        clip: the change is at most this many times the velocity, in norm and sample by sample; None: no limit.
        normalise: the change has `weight` times the norm of the velocity, whatever the gradient's.
        sigma_singular: steps at this noise level or above are left alone; the factor of the gradient grows without
            limit towards sigma 1.
    """

    weight: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    schedule: Schedule = "constant"
    clip: float | None = None
    normalise: bool = False
    sigma_singular: float = 0.999

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise RecipeError(f"weight={self.weight} of guidance must be a finite number")
        if not 0.0 <= self.start < self.stop <= 1.0:
            raise RecipeError(
                f"start={self.start}, stop={self.stop} are shares of the steps: expected 0 <= start < stop <= 1"
            )
        if self.clip is not None and not self.clip > 0.0:
            raise RecipeError(f"clip={self.clip} must be above 0 times the velocity's norm; None: no limit")
        if not 0.0 < self.sigma_singular <= 1.0:
            raise RecipeError(f"sigma_singular={self.sigma_singular} must lie in (0, 1]; 0.999 skips a step at sigma 1")
        scheduled(self.schedule, 0.0)

    def share(self, index: int, num_steps: int, sigma: float) -> float:
        """How much of the weight counts at step `index` of `num_steps`, at noise level `sigma`; 0: no guidance."""
        if sigma >= self.sigma_singular:
            return 0.0
        return scheduled(self.schedule, index / num_steps, self.start, self.stop)

    def at(self, index: int, num_steps: int, sigma: float) -> float:
        """The weight of that step."""
        return self.weight * self.share(index, num_steps, sigma)

    def guided(self, path: Path, v: Tensor, gradient: Tensor, sigma: float, weight: float) -> Tensor:
        """The guided velocity (B, ...), `weight` being that of the step; see `with_score_gradient`."""
        v = at_least_float32(v)
        change = velocity_change(path, gradient, sigma, self.sigma_singular)
        change = weight * (normalised(change, v) if self.normalise else change)
        return v + (change if self.clip is None else clipped(change, v, self.clip))


def posterior_std(path: Path, sigma: Sigma) -> Tensor:
    """sigma / sqrt(alpha^2 + sigma^2), float64, same shape as sigma: std of x0 given x_sigma for data of unit variance.

    How far from the clean estimate LGD-MC looks (Song et al., ICML 2023).
    """
    alpha, level = path.alpha(sigma), as_coefficient(sigma)
    return level / (alpha**2 + level**2).sqrt()


def posterior_slope(path: Path, sigma: Sigma) -> Tensor:
    """alpha / (alpha^2 + sigma^2), float64, same shape as sigma: d x0_hat / d x_sigma for data of unit variance."""
    alpha, level = path.alpha(sigma), as_coefficient(sigma)
    return alpha / (alpha**2 + level**2)


def with_x0_change(path: Path, v: Tensor, change: Tensor, sigma: Sigma) -> Tensor:
    """The velocity (B, ...) whose clean estimate at the same latents is that of `v` plus `change` (B, ...).

    `v - (alpha - sigma alpha_dot) / sigma change`, for rectified flow `v - change / sigma`; sigma must be above 0.
    Universal guidance writes it `eps - alpha / sigma change` (2302.07121).
    """
    v = at_least_float32(v)
    return v - expand_to(determinant(path, sigma) / as_coefficient(sigma), v) * at_least_float32(change)
