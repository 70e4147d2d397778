"""Losses of reward models, against what their papers write."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from alignkit.errors import AlignkitError
from alignkit.objectives.preference import (
    balanced,
    bradley_terry,
    centred,
    moved_centre,
    self_distillation,
    softmax_preference,
    yes_no,
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_bradley_terry_is_the_negative_log_probability_that_the_winner_wins() -> None:
    winners, losers = rand(5), rand(5, seed=1)
    expected = [-math.log(math.exp(w) / (math.exp(w) + math.exp(v))) for w, v in zip(winners.tolist(), losers.tolist())]
    assert_close(bradley_terry(winners, losers), torch.tensor(expected, dtype=torch.float64))


def test_bradley_terry_neither_overflows_nor_loses_its_gradient_far_away() -> None:
    winners = torch.tensor([-1e4], requires_grad=True)
    loss = bradley_terry(winners, torch.tensor([1e4]))
    loss.sum().backward()
    assert loss.item() == 2e4 and winners.grad is not None and winners.grad.item() == -1.0


def test_the_preference_loss_of_a_pair_is_that_of_pickscore() -> None:
    logits, targets = rand(4, 2), torch.tensor([[1, 0], [0, 1], [0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    found = softmax_preference(logits, targets)
    for i, ((a, b), (p, q)) in enumerate(zip(logits.tolist(), targets.tolist())):
        chance = [math.exp(a) / (math.exp(a) + math.exp(b)), math.exp(b) / (math.exp(a) + math.exp(b))]
        cross_entropy = -p * math.log(chance[0]) - q * math.log(chance[1])
        offset = math.log(0.5) if p == 0.5 else 0.0  # the entropy of a tie
        assert found[i].item() == pytest.approx(cross_entropy + offset)


def test_with_two_images_and_no_tie_the_softmax_is_bradley_terry() -> None:
    scores = rand(6, 2)
    targets = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(6, 2)
    assert_close(softmax_preference(scores, targets), bradley_terry(scores[:, 0], scores[:, 1]))


def test_a_tie_that_is_scored_as_a_tie_costs_nothing() -> None:
    targets = torch.full((3, 2), 0.5, dtype=torch.float64)
    even, lead = torch.ones(3, 2, dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(3, 2)
    assert_close(softmax_preference(even, targets), torch.zeros(3, dtype=torch.float64))
    assert bool((softmax_preference(lead, targets) > 0).all())


def test_the_softmax_is_over_the_images_of_a_prompt() -> None:
    logits = rand(3, 4)
    targets = torch.eye(4, dtype=torch.float64)[[2, 0, 1]]
    shifted = logits + rand(3, 1, seed=2)  # one number per prompt
    assert_close(softmax_preference(shifted, targets), softmax_preference(logits, targets))


def test_yes_no_is_binary_cross_entropy_per_answer() -> None:
    logits, labels = rand(4, 3), torch.rand(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    probability = 1 / (1 + (-logits).exp())
    expected = -(labels * probability.log() + (1 - labels) * (1 - probability).log())
    assert_close(yes_no(logits, labels), expected)


def test_self_distillation_is_dinos_loss() -> None:
    student, teacher, centre = rand(4, 3, 5), rand(2, 3, 5, seed=1), rand(5, seed=2)
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for w in range(2):
        target = torch.softmax((teacher[w] - centre) / 0.04, dim=-1)
        for v in range(4):
            if v == w:
                continue
            total += torch.sum(-target * torch.log_softmax(student[v] / 0.1, dim=-1), dim=-1).mean()
            pairs += 1
    assert_close(self_distillation(student, centred(teacher, centre, 0.04), 0.1), total / pairs)


def test_no_gradient_of_self_distillation_reaches_the_teacher() -> None:
    student, teacher = rand(2, 3, 5).requires_grad_(), rand(2, 3, 5, seed=1).requires_grad_()
    self_distillation(student, teacher.softmax(dim=-1), 0.1).backward()
    assert teacher.grad is None and student.grad is not None and bool(student.grad.any())


def test_the_centre_moves_towards_the_mean_of_the_teachers_logits() -> None:
    centre, teacher = rand(5), rand(2, 3, 5, seed=1)
    expected = 0.9 * centre + 0.1 * teacher.reshape(-1, 5).mean(dim=0)
    assert_close(moved_centre(centre, teacher, 0.9), expected)


def one_class_leads() -> torch.Tensor:
    """(2 views, 2 pictures, 3 classes): collapse, and underneath a little that tells the pictures apart."""
    teacher = torch.zeros(2, 2, 3, dtype=torch.float64)
    teacher[..., 0] = 5.0
    teacher[:, 0, 1] = 0.2
    teacher[:, 1, 2] = 0.2
    return teacher


def test_centring_takes_the_lead_from_a_class_that_all_pictures_share() -> None:
    teacher = one_class_leads()
    collapsed = centred(teacher, torch.zeros(3, dtype=torch.float64), 0.04)
    apart = centred(teacher, teacher.reshape(-1, 3).mean(dim=0), 0.04)
    assert collapsed.argmax(dim=-1).unique().tolist() == [0]
    assert apart.argmax(dim=-1).tolist() == [[1, 2], [1, 2]]


def test_balancing_gives_every_class_an_equal_share_and_every_picture_a_probability_of_one() -> None:
    seen = balanced(rand(2, 30, 6), 0.5, rounds=50)
    assert_close(seen.sum(dim=-1), torch.ones(2, 30, dtype=torch.float64))
    assert_close(seen.sum(dim=(0, 1)), torch.full((6,), 10.0, dtype=torch.float64))
    assert balanced(one_class_leads(), 0.04).argmax(dim=-1)[0].tolist() != [0, 0]


def test_balancing_is_sinkhorn_and_knopps_iteration() -> None:
    logits = rand(8, 3)
    share = (logits / 0.7).exp().T  # SwAV's own notation: classes by pictures
    share = share / share.sum()
    for _ in range(3):
        share = share / share.sum(dim=1, keepdim=True) / 3
        share = share / share.sum(dim=0, keepdim=True) / 8
    assert_close(balanced(logits, 0.7), (share * 8).T)


def test_balancing_does_not_overflow_where_the_teacher_is_sharp() -> None:
    assert bool(balanced(1e4 * rand(8, 3), 0.01).isfinite().all())


@pytest.mark.parametrize(
    "call",
    [
        lambda: bradley_terry(rand(3), rand(3, 1)),
        lambda: softmax_preference(rand(3), rand(3)),
        lambda: yes_no(rand(3), rand(3, 1)),
        lambda: self_distillation(rand(1, 3, 5), rand(1, 3, 5), 0.1),
    ],
)
def test_shapes_that_would_broadcast_or_leave_nothing_to_compare_are_refused(call) -> None:
    with pytest.raises(AlignkitError):
        call()
