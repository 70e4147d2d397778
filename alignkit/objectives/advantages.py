"""Rewards to advantages, within groups of samples that share a prompt.

NaN marks a reward that could not be computed: it leaves every statistic and gets advantage 0. A group whose
rewards do not differ carries no signal: it is masked and counted, never divided by an epsilon and trained on.
Standard deviations are of the population (divided by n), as in Flow-GRPO's code. Ranks hold whole groups; for
`scale="batch"` over several ranks, gather the rewards first. Everything is computed in float64 on the CPU and
returned on the device of the rewards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from alignkit.errors import RecipeError
from alignkit.objectives.groups import checked, like, sum_by_group

Scale = Literal["group", "batch", "none"]
SCALES: tuple[str, ...] = get_args(Scale)

TOLERANCE = 1e-6
"""Rewards of one group within this range of each other, relative to the largest above 1, count as equal."""


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    scale: Scale = "group",
    eps: float = 1e-4,
    clip: float | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, Tensor]:
    """Rewards centred in their group, `(r - mean) / (std + eps)`.

    Args:
        rewards: (B,), NaN = not scored.
        groups: (B,) integer ids; equal ids are one group.
        scale: whose std divides: the `group`'s (GRPO), the `batch`'s (Flow-GRPO), or `none` (only centred).
        eps: added to the std; it softens small spreads and never decides alone.
        clip: symmetric bound on the result (published: 5).
        tolerance: see `TOLERANCE`; a group of equal rewards is masked.

    Returns:
        (B,) advantages, 0 wherever the mask is; (B,) bool mask, True where a sample carries signal.
    """
    if scale not in SCALES:
        raise RecipeError(f"scale={scale!r} is not known; expected one of {', '.join(SCALES)}")
    values, valid, index, count = checked(rewards, groups)
    live = valid & ~_flat_groups(values, valid, index, count, tolerance)[index]
    number = sum_by_group(valid.to(values), index, count).clamp_min(1.0)
    centred = values - (sum_by_group(values, index, count) / number)[index]
    centred = torch.where(valid, centred, 0.0)
    if scale == "group":
        std = (sum_by_group(centred**2, index, count) / number).sqrt()[index]
        centred = centred / (std + eps)
    elif scale == "batch" and bool(valid.any()):
        centred = centred / (values[valid].std(correction=0) + eps)
    if clip is not None:
        centred = centred.clamp(-clip, clip)
    advantages = torch.where(live, centred, 0.0)
    return like(rewards, advantages), live.to(rewards.device)


def per_reward_advantages(
    parts: Mapping[str, Tensor],
    weights: Mapping[str, float],
    groups: Tensor,
    scale: Scale = "group",
    eps: float = 1e-4,
    clip: float | None = None,
    batch_normalise: bool = True,
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, Tensor]:
    """GDPO: each reward becomes an advantage in its group, then the weighted sum is normalised over the
    batch.

    Rewards on different scales then pull in proportion to their weights. A reward that is NaN for a sample,
    or flat in a group, contributes 0 there and the others still count.

    Args:
        parts: raw rewards by name, each (B,).
        weights: by the same names.
        batch_normalise: divide by the std of the live samples at the end; their mean is 0 already, as every
            reward is centred in its group.

    Returns:
        As `group_advantages`; a sample is live if any reward with a non-zero weight is.
    """
    if set(parts) != set(weights) or not parts:
        raise RecipeError(
            f"rewards {sorted(parts)} and weights {sorted(weights)} must have the same names, at least one"
        )
    total = torch.zeros(groups.shape, dtype=torch.float64)
    live = torch.zeros(groups.shape, dtype=torch.bool)
    for name, weight in weights.items():
        rewards = parts[name].detach().to("cpu", torch.float64)
        advantages, part_live = group_advantages(rewards, groups, scale, eps, None, tolerance)
        total = total + weight * advantages
        if weight != 0.0:
            live = live | part_live
    if batch_normalise and bool(live.any()):
        total = total / (total[live].std(correction=0) + eps)
    if clip is not None:
        total = total.clamp(-clip, clip)
    first = next(iter(parts.values()))
    return like(first, torch.where(live, total, 0.0)), live.to(first.device)


def quasi_norm(advantages: Tensor, groups: Tensor, p: float = 0.8) -> Tensor:
    """(B,) centred advantages divided by their group's `(sum |A|^p)^(1/p)` (Neighbor GRPO, 2511.16955).

    p = 2 leads to an "average face", 0.8 generalised best. A group of zeros stays zero.
    """
    values, _, index, count = checked(advantages, groups)
    norm = sum_by_group(values.abs() ** p, index, count) ** (1.0 / p)
    norm = torch.where(norm > 0, norm, 1.0)[index]
    return like(advantages, values / norm)


def group_statistics(rewards: Tensor, groups: Tensor, tolerance: float = TOLERANCE) -> dict[str, float]:
    """How much signal a batch of rewards (B,) in `groups` (B,) carries, for the log.

    Returns:
        `groups`: how many; `zero_std_fraction`: share of groups without signal; `valid_fraction`: share of
        samples that were scored; `group_std`: mean std within the groups that have a scored sample.
    """
    values, valid, index, count = checked(rewards, groups)
    number = sum_by_group(valid.to(values), index, count)
    safe = number.clamp_min(1.0)
    centred = torch.where(valid, values - (sum_by_group(values, index, count) / safe)[index], 0.0)
    std = (sum_by_group(centred**2, index, count) / safe).sqrt()
    flat = _flat_groups(values, valid, index, count, tolerance)
    scored = number > 0
    return {
        "groups": float(count),
        "zero_std_fraction": float(flat.double().mean()),
        "valid_fraction": float(valid.double().mean()),
        "group_std": float(std[scored].mean()) if bool(scored.any()) else 0.0,
    }


def _flat_groups(values: Tensor, valid: Tensor, index: Tensor, count: int, tolerance: float) -> Tensor:
    """(count,) bool: the group's valid rewards are all equal, or it has none."""
    empty = torch.full((count,), -torch.inf, dtype=values.dtype)
    high = empty.scatter_reduce(0, index, torch.where(valid, values, -torch.inf), "amax")
    negated = empty.scatter_reduce(0, index, torch.where(valid, -values, -torch.inf), "amax")
    # Relative to |r|, so that rounding does not tell float32 rewards near 26 apart.
    largest = torch.maximum(high, negated)
    return high + negated <= tolerance * largest.clamp_min(1.0)
