"""Losses that teach a scorer from preferences, yes-no labels, or from nothing but pictures (self-distillation)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from alignkit.errors import AlignkitError

FIRST, SECOND, TIE, INVALID = 1, -1, 0, 22
"""Labels of a pair, as VideoReward's data have them: which side is better, neither, or no valid answer."""


def bradley_terry(winners: Tensor, losers: Tensor) -> Tensor:
    """`-log sigmoid(winner - loser)` (Bradley and Terry, 1952), in the shape of its arguments.

    Args:
        winners, losers: (B,) or (B, D) scores of the two sides of each pair, D dimensions judged separately.
    """
    if winners.shape != losers.shape:
        raise AlignkitError(f"winners {tuple(winners.shape)} and losers {tuple(losers.shape)} must have one shape")
    return -F.logsigmoid(winners - losers)


def bradley_terry_ties(lead: Tensor, labels: Tensor, k: float = 5.0) -> Tensor:
    """Negative log-likelihood under Bradley-Terry with ties, in the shape of its arguments; 0 where INVALID.

    Rao and Kupper (1967), as in VideoReward (2501.13918, section 3.3), with `lead = r_first - r_second`:

        P(first wins) = sigmoid(lead - log k)          P(second wins) = sigmoid(-lead - log k)
        P(tie) = (k^2 - 1) P(first wins) P(second wins)

    Args:
        lead: (...) first score minus second.
        labels: same shape, integers: FIRST, SECOND, TIE or INVALID.
        k: above 1; how far a score must lead, log k, to win as often as not. VideoReward has 5.
    """
    if lead.shape != labels.shape:
        raise AlignkitError(f"lead {tuple(lead.shape)} and labels {tuple(labels.shape)} must have one shape")
    if k <= 1:
        raise AlignkitError(f"k={k} must be above 1: at 1 no pair is ever a tie")
    known = torch.tensor((FIRST, SECOND, TIE, INVALID), device=labels.device)
    if not torch.isin(labels, known).all():
        raise AlignkitError(f"labels hold {sorted(set(labels.unique().tolist()))}; expected 1, -1, 0 (tie), 22 (none)")
    first, second = F.logsigmoid(lead - math.log(k)), F.logsigmoid(-lead - math.log(k))
    tie = first + second + math.log(k**2 - 1)
    told = torch.where(labels == FIRST, first, torch.where(labels == SECOND, second, tie))
    return -told.masked_fill(labels == INVALID, 0.0)


def accuracy_without_ties(lead: Tensor, labels: Tensor) -> float:
    """Share of pairs with a winner that lead the right way; nan where there is none. A lead of 0 is wrong.

    Args:
        lead, labels: (B,) as in `bradley_terry_ties`.
    """
    decided = labels.abs() == 1
    return float((lead * labels > 0)[decided].double().mean())


def accuracy_with_ties(lead: Tensor, labels: Tensor, threshold: float) -> float:
    """Share of valid pairs that are told right, where |lead| <= threshold says "tie" (2305.14324, section 6).

    Args:
        lead, labels: (B,) as in `bradley_terry_ties`.
        threshold: at least 0, see `tie_threshold`; below 0 nothing is ever called a tie.
    """
    tied = lead.abs() <= threshold
    right = torch.where(labels == TIE, tied, ~tied & (lead * labels > 0))
    return float(right[labels != INVALID].double().mean())


def tie_threshold(lead: Tensor, labels: Tensor) -> float:
    """The threshold at which `accuracy_with_ties` is highest, the lowest of equals; -1 where ties are best never said.

    Deutsch, Foster and Freitag (2305.14324) choose it, as VideoAlign's evaluation does, on the pairs that are judged,
    so that no scorer loses for the scale of its scores; for a scorer in use choose it on pairs of their own.

    Args:
        lead, labels: (B,) as in `bradley_terry_ties`; at least one of them valid.
    """
    valid = labels != INVALID
    if not valid.any():
        raise AlignkitError(f"none of {len(labels)} pairs has a valid label; expected 1, -1 or 0 (tie) for some")
    distance, order = lead[valid].abs().sort()
    told, signs = labels[valid][order], lead[valid].sign()[order]
    # With the nearest n pairs called ties: right are the ties among them, and the winners behind them.
    ties = F.pad((told == TIE).cumsum(0), (1, 0))
    wins = (told == signs) & (told != TIE)
    right = ties + wins.sum() - F.pad(wins.cumsum(0), (1, 0))
    last = torch.ones_like(right, dtype=torch.bool)
    last[1:-1] = distance[1:] > distance[:-1]  # pairs at one distance are called ties together
    best = int(right.masked_fill(~last, -1).argmax())
    return -1.0 if best == 0 else float(distance[best - 1])


def softmax_preference(logits: Tensor, targets: Tensor) -> Tensor:
    """(B,) cross-entropy over the images of one prompt, less the targets' entropy, so that the least is 0.

    PickScore (2305.01569) with two images, HPSv2 (2306.09341) with several. A tie has equal targets; without the
    entropy its loss could not fall below log 2.

    Args:
        logits: (B, G) scores of G images of one prompt, times a scale.
        targets: (B, G) preference probabilities, each row sums to 1.
    """
    if logits.shape != targets.shape or logits.ndim != 2:
        raise AlignkitError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must both be (B, G)")
    return (torch.xlogy(targets, targets) - targets * logits.log_softmax(dim=-1)).sum(dim=-1)


def yes_no(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of `sigmoid(logits)`, in the shape of its arguments.

    Args:
        logits: (B,) or (B, D), for a judge's answer `logit_yes - logit_no`.
        labels: same shape, in [0, 1], 1 = yes.
    """
    if logits.shape != labels.shape:
        raise AlignkitError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must have one shape")
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")


def self_distillation(student: Tensor, seen: Tensor, temperature: float) -> Tensor:
    """DINO's loss (2104.14294), a scalar: the student's view of a picture predicts what the teacher sees in another.

    Mean over pairs of views and pictures of `-sum_k seen log p_student`. Views are numbered alike, the teacher's first;
    the pairs of a view with itself are left out.

    Args:
        student: (V, B, K) logits of all V views.
        seen: (W, B, K) the teacher's probabilities for the first W <= V views, by `centred` or `balanced`; no
            gradient flows into them.
        temperature: of the student, above 0.
    """
    if student.shape[1:] != seen.shape[1:] or len(seen) > len(student) or len(student) < 2:
        raise AlignkitError(
            f"student {tuple(student.shape)} must be (V, B, K) with V >= 2, seen {tuple(seen.shape)} its first views"
        )
    predicted = (student / temperature).log_softmax(dim=-1)
    pairs = [(w, v) for w in range(len(seen)) for v in range(len(student)) if v != w]
    return -torch.stack([(seen[w].detach() * predicted[v]).sum(dim=-1).mean() for w, v in pairs]).mean()


def centred(teacher: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """The teacher's probabilities (..., K): logits less their running mean, sharpened (DINO, 2104.14294).

    Centring alone ends in every class evenly for every picture, sharpening alone in one class; both together in
    neither, where batches are large and the teacher slow.

    Args:
        teacher: (..., K) logits.
        centre: (K,), see `moved_centre`.
        temperature: below the student's.
    """
    return ((teacher - centre) / temperature).softmax(dim=-1)


def moved_centre(centre: Tensor, teacher: Tensor, momentum: float) -> Tensor:
    """(K,) `momentum * centre + (1 - momentum) * mean(teacher)`.

    Args:
        centre: (K,).
        teacher: (..., K) logits of a batch.
        momentum: in [0, 1]; 0.9 in the paper.
    """
    return torch.lerp(teacher.detach().flatten(0, -2).mean(dim=0), centre, momentum)


def balanced(teacher: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    """The teacher's probabilities (..., K) by Sinkhorn and Knopp, as in SwAV (2006.09882) and DINOv2 (2304.07193).

    Classes get equal shares of the batch, pictures a probability of 1 each, in turn; no class can take all pictures.

    Args:
        teacher: (..., K) logits of a batch.
        temperature: above 0.
        rounds: after three the shares are equal up to a few percent.
    """
    log_share = (teacher / temperature).flatten(0, -2)
    for _ in range(rounds):
        log_share = log_share - log_share.logsumexp(dim=0, keepdim=True)
        log_share = log_share - log_share.logsumexp(dim=1, keepdim=True)
    return log_share.exp().view_as(teacher)
