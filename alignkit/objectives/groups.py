"""Sums over groups of samples that share a prompt, for everything that turns rewards into advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit.errors import AlignkitError


def checked(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Float64 rewards on the CPU with 0 for NaN, validity, each sample's group as 0..count-1, count.

    Raises:
        AlignkitError: not (B,) both, no integer ids, or an infinite reward.
    """
    if rewards.ndim != 1 or rewards.shape != groups.shape or rewards.numel() == 0:
        raise AlignkitError(
            f"rewards {tuple(rewards.shape)} and groups {tuple(groups.shape)} must both be (B,), B at least 1"
        )
    if groups.is_floating_point() or groups.dtype == torch.bool:
        raise AlignkitError(f"groups are integer ids, not {groups.dtype}")
    if bool(rewards.isinf().any()):
        raise AlignkitError("a reward is infinite; expected a number, or NaN for one not computed")
    values = rewards.detach().to("cpu", torch.float64)
    valid = ~values.isnan()
    ids, index = torch.unique(groups.to("cpu"), return_inverse=True)
    return torch.where(valid, values, 0.0), valid, index, int(ids.numel())


def sum_by_group(values: Tensor, index: Tensor, count: int) -> Tensor:
    """(count,) sums of (B,) values by group index."""
    return torch.zeros(count, dtype=values.dtype).index_add(0, index, values)


def members(groups: Tensor) -> list[Tensor]:
    """Rows (G,) of each group, groups in the order of their ids."""
    own = groups.to("cpu")
    return [(own == group).nonzero()[:, 0] for group in own.unique()]


def like(rewards: Tensor, values: Tensor) -> Tensor:
    """`values` on the device of `rewards`, float32 unless `rewards` are float64."""
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return values.to(rewards.device, dtype)
