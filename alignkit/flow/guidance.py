"""Functions from a velocity to a velocity."""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit.flow.path import (
    Path,
    Sigma,
    as_coefficient,
    at_least_float32,
    expand_to,
    score_to_velocity_rate,
)


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
    v, gradient = at_least_float32(v), at_least_float32(gradient)
    level = as_coefficient(sigma)
    singular = level >= sigma_singular
    rate = torch.where(singular, 0.0, score_to_velocity_rate(path, torch.where(singular, 0.5, level)))
    return v - expand_to(weight * rate, v) * gradient
