"""Losses that teach a scorer from preferences, yes-no labels, or from nothing but pictures (self-distillation)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alignkit.errors import AlignkitError


def bradley_terry(winners: Tensor, losers: Tensor) -> Tensor:
    """`-log sigmoid(winner - loser)` (Bradley and Terry, 1952), in the shape of its arguments.

    Args:
        winners, losers: (B,) or (B, D) scores of the two sides of each pair, D dimensions judged separately.
    """
    if winners.shape != losers.shape:
        raise AlignkitError(f"winners {tuple(winners.shape)} and losers {tuple(losers.shape)} must have one shape")
    return -F.logsigmoid(winners - losers)


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


def self_distillation(
    student: Tensor, teacher: Tensor, centre: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """DINO's loss (2104.14294), a scalar: the student's view of a picture predicts what the teacher sees in another.

    Mean over pairs of views and pictures of `-sum_k p_teacher log p_student`, where the teacher's logits are centred
    and sharpened. Views are numbered alike, teacher's first; the pairs of a view with itself are left out.

    Args:
        student: (V, B, K) logits of all V views.
        teacher: (W, B, K) logits of the first W <= V views; no gradient flows into them.
        centre: (K,) running mean of the teacher's logits, see `moved_centre`.
        student_temperature, teacher_temperature: above 0; the teacher's is the lower one (sharpening).
    """
    if student.shape[1:] != teacher.shape[1:] or len(teacher) > len(student) or len(student) < 2:
        raise AlignkitError(
            f"student {tuple(student.shape)} must be (V, B, K) with V >= 2, and teacher {tuple(teacher.shape)} "
            "its first views"
        )
    predicted = (student / student_temperature).log_softmax(dim=-1)
    seen = ((teacher.detach() - centre) / teacher_temperature).softmax(dim=-1)
    pairs = [(w, v) for w in range(len(teacher)) for v in range(len(student)) if v != w]
    return -torch.stack([(seen[w] * predicted[v]).sum(dim=-1).mean() for w, v in pairs]).mean()


def moved_centre(centre: Tensor, teacher: Tensor, momentum: float) -> Tensor:
    """(K,) `momentum * centre + (1 - momentum) * mean(teacher)`; without it all pictures fall into one class.

    Args:
        centre: (K,).
        teacher: (..., K) logits of a batch.
        momentum: in [0, 1]; 0.9 in the paper.
    """
    return torch.lerp(teacher.detach().flatten(0, -2).mean(dim=0), centre, momentum)
