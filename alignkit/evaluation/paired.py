"""Differences of means with the prompt as the unit: paired by prompt, with a bootstrap interval."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 10_000


@dataclass(frozen=True)
class Interval:
    """The mean of N differences.

    Attributes:
        mean: of the differences.
        low, high: percentile bootstrap interval that holds 95 %.
        error: standard error of the mean, from the differences' standard deviation.
    """

    mean: float
    low: float
    high: float
    error: float


def paired(ours: Tensor, theirs: Tensor, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The mean of `ours - theirs` over prompts.

    Args:
        ours, theirs: (N,) one number per prompt, the same prompts in the same order; average several samples of a
            prompt first, since they are not independent. Prompts where either is NaN are left out.
        draws: of the bootstrap; `seed` is theirs.

    Raises:
        ValueError: fewer than two prompts have both numbers.
    """
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise ValueError(f"expected two (N,) of the same prompts; got {tuple(ours.shape)} and {tuple(theirs.shape)}")
    differences = ours.double().cpu() - theirs.double().cpu()
    differences = differences[differences.isfinite()]
    count = len(differences)
    if count < 2:
        raise ValueError(f"{count} prompts have both numbers; an interval needs at least 2")
    rows = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(seed))
    low, high = differences[rows].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    error = differences.std() / count**0.5
    return Interval(float(differences.mean()), float(low), float(high), float(error))
