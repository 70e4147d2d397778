"""Bradley-Terry with ties and accuracies with ties, against their papers written out as loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from alignkit.errors import AlignkitError
from alignkit.objectives.preference import (
    FIRST,
    INVALID,
    SECOND,
    TIE,
    accuracy_with_ties,
    accuracy_without_ties,
    bradley_terry,
    bradley_terry_ties,
    tie_threshold,
)

DOUBLE = torch.float64
K = 5.0


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def probability(a: float, b: float) -> float:
    """P(A > B) = e^rA / (e^rA + theta e^rB)."""
    return math.exp(a) / (math.exp(a) + K * math.exp(b))


def tie_probability(a: float, b: float) -> float:
    """P(tie) = (theta^2 - 1) e^(rA + rB) / ((e^rA + theta e^rB) (theta e^rA + e^rB))."""
    ways = (math.exp(a) + K * math.exp(b)) * (K * math.exp(a) + math.exp(b))
    return (K**2 - 1) * math.exp(a + b) / ways


def losses(lead: torch.Tensor, label: int) -> torch.Tensor:
    return bradley_terry_ties(lead, torch.full(lead.shape, label))


def test_each_label_costs_its_negative_log_probability_as_the_paper_writes_it() -> None:
    first, second = rand(20), rand(20, seed=1)
    for i, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        lead = (first - second)[i : i + 1]
        assert losses(lead, FIRST).item() == pytest.approx(-math.log(probability(a, b)))
        assert losses(lead, SECOND).item() == pytest.approx(-math.log(probability(b, a)))
        assert losses(lead, TIE).item() == pytest.approx(-math.log(tie_probability(a, b)))


def test_win_loss_and_tie_have_probabilities_that_sum_to_1() -> None:
    lead = rand(50)
    total = sum(torch.exp(-losses(lead, label)) for label in (FIRST, SECOND, TIE))
    assert_close(total, torch.ones(50, dtype=DOUBLE))


def test_equal_scores_make_a_tie_the_likely_answer_at_a_loss_of_0_4055() -> None:
    assert losses(torch.zeros(1, dtype=DOUBLE), TIE).item() == pytest.approx(2 * math.log(6) - math.log(24))
    assert losses(torch.zeros(1, dtype=DOUBLE), TIE).item() == pytest.approx(0.4055, abs=5e-5)


def test_a_winner_far_ahead_costs_nothing_and_one_far_behind_has_a_gradient_of_1() -> None:
    lead = torch.tensor([1e4, -1e4], dtype=DOUBLE, requires_grad=True)
    loss = losses(lead, FIRST)
    loss.sum().backward()
    assert loss[0].item() == 0.0 and loss[1].item() == pytest.approx(1e4 + math.log(K))
    assert lead.grad is not None and lead.grad.tolist() == [0.0, -1.0]


def test_a_tie_draws_scores_together_and_a_missing_label_leaves_them_alone() -> None:
    lead = torch.tensor([2.0, -2.0, 5.0], dtype=DOUBLE, requires_grad=True)
    loss = bradley_terry_ties(lead, torch.tensor([TIE, TIE, INVALID]))
    loss.sum().backward()
    assert loss[2].item() == 0.0 and lead.grad is not None
    assert lead.grad[0] > 0 > lead.grad[1] and lead.grad[2] == 0


def test_as_k_nears_1_ties_vanish_and_what_is_left_is_bradley_terry() -> None:
    first, second = rand(10), rand(10, seed=1)
    near = bradley_terry_ties(first - second, torch.full((10,), FIRST), k=1 + 1e-12)
    assert_close(near, bradley_terry(first, second))
    with pytest.raises(AlignkitError, match="above 1"):
        bradley_terry_ties(first, torch.ones(10), k=1.0)


@pytest.mark.parametrize("labels", [torch.tensor([2, 0]), torch.tensor([[1], [0]])])
def test_other_labels_and_shapes_are_refused(labels: torch.Tensor) -> None:
    with pytest.raises(AlignkitError, match=r"expected 1, -1, 0|must have one shape"):
        bradley_terry_ties(torch.zeros(2), labels)


def written_out(lead: list[float], labels: list[int], threshold: float) -> float:
    """(C + T_hm) / (C + D + T_h + T_m + T_hm), Deutsch et al., equation 5."""
    right = counted = 0
    for m, h in zip(lead, labels, strict=True):
        if h != INVALID:
            counted += 1
            tied = abs(m) <= threshold
            right += (h == 0 and tied) or (h != 0 and not tied and h * m > 0)
    return right / counted


def some_pairs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    lead = torch.randn(40, generator=rng, dtype=DOUBLE)
    lead[5:9] = lead[4]  # pairs at one distance
    labels = torch.tensor([FIRST, SECOND, TIE, INVALID])[torch.randint(4, (40,), generator=rng)]
    return lead, labels


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_best_of_all_there_are(seed: int) -> None:
    lead, labels = some_pairs(seed)
    candidates = [-1.0, *sorted(lead.abs().tolist())]
    shares = [written_out(lead.tolist(), labels.tolist(), one) for one in candidates]
    found = tie_threshold(lead, labels)
    assert found == pytest.approx(candidates[shares.index(max(shares))])
    assert accuracy_with_ties(lead, labels, found) == pytest.approx(max(shares))


def test_without_ties_the_best_threshold_calls_nothing_a_tie() -> None:
    lead, labels = torch.tensor([0.1, -2.0, 3.0]), torch.tensor([FIRST, SECOND, FIRST])
    assert tie_threshold(lead, labels) == -1.0
    assert accuracy_with_ties(lead, labels, -1.0) == 1.0
    assert tie_threshold(lead, torch.zeros(3, dtype=torch.long)) == 3.0
    with pytest.raises(AlignkitError, match="none of 3 pairs"):
        tie_threshold(lead, torch.full((3,), INVALID))


def test_accuracy_without_ties_asks_only_pairs_with_a_winner_and_equal_scores_are_wrong() -> None:
    lead = torch.tensor([1.0, -1.0, 0.0, 4.0, -4.0])
    assert accuracy_without_ties(lead, torch.tensor([FIRST, FIRST, SECOND, TIE, INVALID])) == pytest.approx(1 / 3)
    assert math.isnan(accuracy_without_ties(lead, torch.zeros(5)))


def test_below_a_threshold_of_0_nothing_is_called_a_tie_not_even_a_lead_of_0() -> None:
    lead, labels = torch.tensor([0.0, 2.0, 0.0]), torch.tensor([TIE, FIRST, FIRST])
    assert accuracy_with_ties(lead, labels, -1.0) == pytest.approx(1 / 3)
    assert accuracy_with_ties(lead, labels, 0.0) == pytest.approx(2 / 3)
