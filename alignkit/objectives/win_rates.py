"""From a pairwise judge's verdicts inside one group to a reward per sample (Pref-GRPO, 2508.20751).

A group's win rates always sum to G / 2, so their mean cannot rise: watch a frozen pointwise reward beside them.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from alignkit.errors import AlignkitError

TIE = 1e-6
"""Probabilities within this of 0.5 are ties."""


def symmetric(verdicts: Tensor) -> Tensor:
    """(G, G) W with `W[i, j] = (P[i, j] + 1 - P[j, i]) / 2`, so that `W + W.T` is 1: position bias cancels.

    Args:
        verdicts: (G, G) P[i, j], the probability that i is better, asked with i shown first; NaN where the judge gave
            no verdict, which counts as 0.5. The diagonal is ignored and 0.5 in the result.
    """
    if verdicts.ndim != 2 or verdicts.shape[0] != verdicts.shape[1]:
        raise AlignkitError(f"verdicts {tuple(verdicts.shape)} must be (G, G)")
    asked = torch.where(verdicts.isnan(), 0.5, verdicts)
    return ((asked + 1 - asked.T) / 2).fill_diagonal_(0.5)


def win_rates(verdicts: Tensor) -> Tensor:
    """(G,) `r_i = 1 / (G - 1) sum_j W[i, j]`, both orders averaged; NaN for a sample that no verdict is about.

    Args:
        verdicts: as in `symmetric`, G at least 2.
    """
    size = len(verdicts)
    if size < 2:
        raise AlignkitError(f"win rates need a group of at least 2, given {size}")
    rates = (symmetric(verdicts).sum(dim=1) - 0.5) / (size - 1)
    answered = ~verdicts.isnan() & ~torch.eye(size, dtype=torch.bool, device=verdicts.device)
    return rates.masked_fill(~(answered.any(dim=1) | answered.any(dim=0)), torch.nan)


def verdict_statistics(verdicts: Tensor) -> dict[str, float]:
    """How a judge behaved on one group: shares in [0, 1], and the bias.

    Returns:
        `no_verdict`: of the G (G - 1) questions; `order_bias`: mean of P - 0.5 over the answered ones, above 0 if it
        favours what it sees first; `ties`: of the pairs; `intransitive`: of the triples, those that go in a circle.
        NaN where there is nothing to count.
    """
    size = len(verdicts)
    off = ~torch.eye(size, dtype=torch.bool, device=verdicts.device)
    asked = verdicts[off].double()
    both = symmetric(verdicts)
    pairs = [float(both[i, j]) for i, j in combinations(range(size), 2)]
    beats = (both > 0.5 + TIE).tolist()
    triples = [
        (beats[i][j] and beats[j][k] and beats[k][i]) or (beats[j][i] and beats[k][j] and beats[i][k])
        for i, j, k in combinations(range(size), 3)
    ]
    answered = asked[~asked.isnan()]
    return {
        "no_verdict": float(asked.isnan().double().mean()),
        "order_bias": float(answered.mean() - 0.5) if len(answered) else float("nan"),
        "ties": _share([abs(p - 0.5) <= TIE for p in pairs]),
        "intransitive": _share(triples),
    }


def _share(flags: list[bool]) -> float:
    return sum(flags) / len(flags) if flags else float("nan")
