"""The clipped policy-gradient loss of one stochastic step, its ratio, and what to watch."""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit.errors import AlignkitError, RecipeError
from alignkit.flow.steps import StepCoefficients
from alignkit.flow.transition import reduce_positions


def clipped_objective(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip: float,
    clip_high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's loss `max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip_high))`, to be minimised.

    Args:
        log_prob, old_log_prob: (B,) of the same latents, reduced the same way.
        advantages: (B,).
        clip: half-width of the trusted range; 1e-5 to 1e-3 when log-probabilities are averaged over
            dimensions and 0.2 when summed.
        clip_high: upper half-width when it differs.

    Returns:
        (B,) loss and (B,) ratio.
    """
    _same_shape(log_prob=log_prob, old_log_prob=old_log_prob)
    ratio = (log_prob - old_log_prob).exp()
    return clipped_loss(ratio, advantages, clip, clip_high), ratio


def clipped_loss(ratio: Tensor, advantages: Tensor, clip: float, clip_high: float | None = None) -> Tensor:
    """(B,) the loss of `clipped_objective` for a ratio (B,) from elsewhere, such as `ratio_norm`."""
    _same_shape(ratio=ratio, advantages=advantages)
    low, high = _bounds(clip, clip_high)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))


def ratio_norm(
    log_prob: Tensor,
    old_log_prob: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    std: float | Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """GRPO-Guard's ratio (2510.22319), (B,): `exp((log_prob - old_log_prob + b) std)`.

    `b = mean((mean - old_mean)^2) / (2 std^2)` per sample undoes the drift that a mean-reduced Gaussian
    log-ratio has, which otherwise lets a symmetric clip act on one side only; the factor std evens the steps
    out.

    Args:
        log_prob, old_log_prob: (B,) averaged (not summed) over dimensions.
        mean, old_mean: (B, ...) of the step under the two policies.
        std: of the step, g sqrt(-dt): one number or (B,).
        mask: as many axes as `mean`, 1 = free; the mask the log-probabilities used.
    """
    _same_shape(log_prob=log_prob, old_log_prob=old_log_prob)
    _same_shape(mean=mean, old_mean=old_mean)
    width = torch.as_tensor(std, dtype=log_prob.dtype, device=log_prob.device)
    if width.shape not in ((), log_prob.shape):
        raise AlignkitError(
            f"std of shape {tuple(width.shape)} must be one number or {tuple(log_prob.shape)}"
        )
    drift = reduce_positions((mean - old_mean) ** 2, mask, "mean") / (2.0 * width**2)
    return ((log_prob - old_log_prob + drift) * width).exp()


def clip_fractions(
    ratio: Tensor, clip: float, clip_high: float | None = None, live: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Shares of the live samples whose ratio (B,) is below, and above, the clip range; they should be
    alike."""
    low, high = _bounds(clip, clip_high)
    live = torch.ones_like(ratio, dtype=torch.bool) if live is None else live
    return masked_mean((ratio < low).to(ratio), live), masked_mean((ratio > high).to(ratio), live)


def masked_mean(values: Tensor, live: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """Mean of `values` (B,) where `live` (B,) bool, 0 if nothing is; still attached to the graph of `values`.

    Args:
        denominator: divide by this instead of by the number of live samples, so that the micro-batches of one
            update add up to its mean: give the number of live samples of the whole update.
    """
    _same_shape(values=values, live=live)
    total = torch.where(live, values, 0.0).sum()
    if denominator is None:
        return total / live.sum().clamp_min(1)
    return total / denominator


def log_prob_sensitivity(step: StepCoefficients) -> Tensor:
    """|d log_prob / d v| of one dimension for noise |z| = 1, `|d mean / d v| / std`; 0-d or (B,).

    `step` is `noise.coefficients(path, sigma, sigma_next, sigma_max)`. For Flow-SDE and Dance-SDE on
    rectified flow, with std = g sqrt(-dt), this is `sqrt(-dt) / g + g sqrt(-dt) (1 - sigma) / (2 sigma)`
    (Flash-GRPO, 2605.15980). Infinite for a step without noise.
    """
    return step.velocity.abs() / step.std


def flash_weights(sensitivity: Tensor) -> Tensor:
    """(N,) weights proportional to 1 / sensitivity with mean 1: steps then pull equally (Flash-GRPO)."""
    inverse = 1.0 / sensitivity
    return inverse / inverse.mean()


def _bounds(clip: float, clip_high: float | None) -> tuple[float, float]:
    high = clip if clip_high is None else clip_high
    if not (0.0 < clip < 1.0 and high > 0.0):
        raise RecipeError(f"clip={clip} must lie between 0 and 1 and clip_high={high} above 0; usual: 1e-4")
    return 1.0 - clip, 1.0 + high


def _same_shape(**tensors: Tensor) -> None:
    """Broadcasting (B,) against (B, 1) would silently compare every sample with every other."""
    if len({tensor.shape for tensor in tensors.values()}) != 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise AlignkitError(f"these must have the same shape: {shapes}")
