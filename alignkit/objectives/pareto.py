"""Which samples no other sample beats on every reward (Parrot, 2401.05675)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.objectives.groups import members


def non_dominated(rewards: Tensor, groups: Tensor | None = None) -> Tensor:
    """(N,) bool: no sample of the same group is at least as good on all rewards and better on one.

    Equal samples do not dominate each other and are all kept. A sample with a reward that was not computed (NaN) is
    left out and dominates nothing. With four rewards or more nearly everything is kept unless groups are large.

    Args:
        rewards: (N, K), higher is better on every one.
        groups: (N,) integer ids; None compares across the whole batch, as the paper does, which mixes easy with hard
            prompts.
    """
    if rewards.ndim != 2:
        raise AlignkitError(f"rewards {tuple(rewards.shape)} must be (N, K): samples by rewards")
    own = torch.zeros(len(rewards), dtype=torch.int64) if groups is None else groups
    values = rewards.detach().to("cpu", torch.float64)
    keep = torch.zeros(len(rewards), dtype=torch.bool)
    for rows in members(own):
        scored = rows[~values[rows].isnan().any(dim=1)]
        mine = rearrange(values[scored], "i k -> i 1 k")
        other = rearrange(values[scored], "j k -> 1 j k")
        dominated = ((other >= mine).all(dim=2) & (other > mine).any(dim=2)).any(dim=1)
        keep[scored] = ~dominated
    return keep.to(rewards.device)
