"""The coefficients of one step from sigma to sigma_next: `x' = a x + b v + std z`.

Primes mark sigma_next, dt = sigma' - sigma < 0. Every first-order step of both paths is linear in the
latents and the velocity, so a step is three numbers, computed in float64. Two shared formulas:

    ddim, cps, stepwise   x' = alpha' x0_hat + sqrt(sigma'^2 - s^2) eps_hat + s z, with different s(level)
    flow_sde, dance_sde   x' = ode mean - g^2 score dt / 2 + g sqrt(-dt) z, with different g(level)

`ode` is either of them without noise: alpha' x0_hat + sigma' eps_hat, which is `x + v dt` for rectified flow
and deterministic DDIM for variance preserving.

Which to choose: `flow_sde` and `dance_sde` keep the marginals as the steps grow finer; `cps` does not
(samples are under-dispersed at any number of steps) but is clean at ten; `ddim` is for variance-preserving
models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.errors import RecipeError
from alignkit.flow.path import Path, Sigma, as_coefficient, determinant


@dataclass(frozen=True)
class StepCoefficients:
    """`x' = latents * x + velocity * v + std * z`, each 0-d or (B,), float64.

    Attributes:
        velocity: also d mean / d v, which turns velocity differences into mean differences.
    """

    latents: Tensor
    velocity: Tensor
    std: Tensor


StepRule = Callable[[Path, Sigma, Sigma, float, Sigma], StepCoefficients]
"""(path, sigma, sigma_next, level, sigma_max) -> coefficients; a rule ignores what its formula lacks."""


def ode(
    path: Path, sigma: Sigma, sigma_next: Sigma, level: float = 0.0, sigma_max: Sigma = 1.0
) -> StepCoefficients:
    """alpha' x0_hat + sigma' eps_hat, no noise; `level` has no part in it."""
    level_now, level_next = _levels(sigma, sigma_next)
    return _recombine(path, level_now, level_next, torch.zeros_like(level_now - level_next))


def ddim(
    path: Path, sigma: Sigma, sigma_next: Sigma, level: float, sigma_max: Sigma = 1.0
) -> StepCoefficients:
    """DDIM with eta = `level` (2010.02502; DDPO uses 1).

    s = eta sqrt((sigma'^2 / sigma^2) (1 - alpha^2 / alpha'^2))
    """
    level_now, level_next = _levels(sigma, sigma_next)
    removed = 1.0 - (path.alpha(level_now) / path.alpha(level_next)) ** 2
    std = level * level_next / level_now * removed.clamp_min(0.0).sqrt()
    return _recombine(path, level_now, level_next, std)


def cps(
    path: Path, sigma: Sigma, sigma_next: Sigma, level: float, sigma_max: Sigma = 1.0
) -> StepCoefficients:
    """Coefficient-preserving sampling (2509.05952, published level 0.8): s = sigma' sin(level pi / 2)."""
    level_now, level_next = _levels(sigma, sigma_next)
    std = level_next * math.sin(level * math.pi / 2.0)
    return _recombine(path, level_now, level_next, std + torch.zeros_like(level_now))


def stepwise(
    path: Path, sigma: Sigma, sigma_next: Sigma, level: float, sigma_max: Sigma = 1.0
) -> StepCoefficients:
    """The sampler of Stepwise-Flow-GRPO (2603.28718): s = level sigma' sqrt(1 - sigma)."""
    level_now, level_next = _levels(sigma, sigma_next)
    std = level * level_next * (1.0 - level_now).clamp_min(0.0).sqrt()
    return _recombine(path, level_now, level_next, std)


def flow_sde(path: Path, sigma: Sigma, sigma_next: Sigma, level: float, sigma_max: Sigma) -> StepCoefficients:
    """Flow-SDE (Flow-GRPO, 2505.05470, published level 0.7).

    g^2 = level^2 sigma (1 - sigma alpha_dot / alpha); for rectified flow g = level sqrt(sigma / (1 -
    sigma)); level sqrt(2) is the memoryless SDE of Adjoint Matching. g is infinite at sigma = 1: where sigma
    exceeds `sigma_max` (the second value of the schedule), the denominator uses `sigma_max` instead.
    """
    level_now, level_next = _levels(sigma, sigma_next)
    guarded = torch.minimum(level_now, as_coefficient(sigma_max).to(level_now.device))
    rate = level_now * determinant(path, guarded) / path.alpha(guarded)
    return _diffuse(path, level_now, level_next, level**2 * rate)


def dance_sde(
    path: Path, sigma: Sigma, sigma_next: Sigma, level: float, sigma_max: Sigma = 1.0
) -> StepCoefficients:
    """Dance-SDE (DanceGRPO, 2505.07818): constant g = level (0.3 for FLUX, 0.25 for HunyuanVideo)."""
    level_now, level_next = _levels(sigma, sigma_next)
    return _diffuse(path, level_now, level_next, torch.full_like(level_now, level**2))


TRANSITIONS: dict[str, StepRule] = {
    "ode": ode,
    "flow_sde": flow_sde,
    "dance_sde": dance_sde,
    "cps": cps,
    "ddim": ddim,
    "stepwise": stepwise,
}


def _levels(sigma: Sigma, sigma_next: Sigma) -> tuple[Tensor, Tensor]:
    now, after = as_coefficient(sigma), as_coefficient(sigma_next)
    after = after.to(now.device) if after.ndim == 0 else after
    now = now.to(after.device) if now.ndim == 0 else now
    if not bool((after < now).all()):
        raise RecipeError(
            f"a step goes towards data: sigma_next={after.tolist()} must be below sigma={now.tolist()}; "
            "1 is noise and 0 is data"
        )
    return now, after


def _recombine(path: Path, sigma: Tensor, sigma_next: Tensor, std: Tensor) -> StepCoefficients:
    """alpha' x0_hat + sqrt(sigma'^2 - std^2) eps_hat + std z."""
    if bool((std > sigma_next * (1.0 + 1e-6)).any()):
        raise RecipeError(
            f"the step from sigma={sigma.tolist()} to {sigma_next.tolist()} would inject std={std.tolist()}, "
            "more noise than sigma_next holds; lower the noise level (ddim with level near 1 is for "
            "variance-preserving models, on rectified flow use cps or flow_sde)"
        )
    kept = (sigma_next**2 - std**2).clamp_min(0.0).sqrt()
    alpha, alpha_dot, alpha_next = path.alpha(sigma), path.alpha_dot(sigma), path.alpha(sigma_next)
    det = determinant(path, sigma)
    return StepCoefficients(
        latents=(alpha_next - kept * alpha_dot) / det,
        velocity=(kept * alpha - alpha_next * sigma) / det,
        std=std,
    )


def _diffuse(path: Path, sigma: Tensor, sigma_next: Tensor, g_squared: Tensor) -> StepCoefficients:
    """ode mean - g^2 score dt / 2 + g sqrt(-dt) z, with score = (alpha_dot x - alpha v) / (D sigma)."""
    drift = _recombine(path, sigma, sigma_next, torch.zeros_like(sigma - sigma_next))
    dt = sigma_next - sigma
    half = g_squared * dt / (2.0 * determinant(path, sigma) * sigma)
    return StepCoefficients(
        latents=drift.latents - half * path.alpha_dot(sigma),
        velocity=drift.velocity + half * path.alpha(sigma),
        std=(g_squared * -dt).sqrt(),
    )
