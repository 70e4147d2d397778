"""Paired differences of means and their bootstrap intervals."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.evaluation.paired import paired


def normal(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_of_normal_differences_is_the_textbook_one() -> None:
    theirs = normal(400, 0) * 5
    differences = 0.3 + normal(400, 1)
    found = paired(theirs + differences, theirs)
    error = float(differences.std()) / math.sqrt(400)
    assert found.mean == pytest.approx(float(differences.mean())) and found.error == pytest.approx(error)
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.15 * error)


def test_intervals_hold_the_truth_about_95_times_in_100() -> None:
    held = [
        (p := paired(0.2 + normal(60, seed), torch.zeros(60), draws=500)).low <= 0.2 <= p.high for seed in range(200)
    ]
    assert 0.89 <= sum(held) / len(held) <= 0.99


def test_pairing_removes_what_prompts_have_in_common() -> None:
    easy_or_hard = normal(50, 2) * 100
    found = paired(easy_or_hard + 1 + 0.1 * normal(50, 3), easy_or_hard)
    assert 0.9 < found.low < found.high < 1.1


def test_prompts_without_both_numbers_are_left_out() -> None:
    ours = torch.tensor([1.0, float("nan"), 3.0, 5.0])
    theirs = torch.tensor([0.0, 0.0, 1.0, float("nan")])
    assert paired(ours, theirs).mean == pytest.approx(1.5)


@pytest.mark.parametrize("ours", [torch.ones(1), torch.tensor([1.0, float("nan")])])
def test_one_prompt_has_no_interval(ours: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        paired(ours, torch.zeros(len(ours)))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        paired(torch.ones(3), torch.ones(4))
