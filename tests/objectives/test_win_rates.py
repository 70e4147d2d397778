from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from alignkit.errors import AlignkitError
from alignkit.objectives.win_rates import symmetric, verdict_statistics, win_rates

NAN = float("nan")


def judged(size: int, seed: int = 0, bias: float = 0.0) -> torch.Tensor:
    """Verdicts that are 1, 0.5 or 0, with a position bias."""
    rng = torch.Generator().manual_seed(seed)
    gold = torch.randn(size, generator=rng, dtype=torch.float64)
    chance = (torch.sigmoid(gold[:, None] - gold[None, :]) + bias).clamp(0, 1)
    verdicts = torch.bernoulli(chance, generator=rng)
    return torch.where(torch.rand(size, size, generator=rng) < 0.1, 0.5, verdicts)


def test_win_rates_are_the_loop_of_the_paper_with_both_orders() -> None:
    verdicts = judged(6)
    wins = torch.zeros(6, 6, dtype=torch.float64)
    for i in range(6):
        for j in range(i + 1, 6):
            p = 0.5 * (verdicts[i, j] + 1 - verdicts[j, i])
            wins[i, j], wins[j, i] = p, 1 - p
    assert_close(win_rates(verdicts), wins.sum(dim=1) / 5)


@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_the_rates_of_a_group_sum_to_half_its_size(bias: float) -> None:
    assert float(win_rates(judged(8, bias=bias)).sum()) == pytest.approx(4.0)


def test_a_judge_that_only_sees_positions_gives_everybody_a_half() -> None:
    verdicts = torch.ones(5, 5)
    assert_close(win_rates(verdicts), torch.full((5,), 0.5))
    assert verdict_statistics(verdicts)["order_bias"] == 0.5
    assert verdict_statistics(verdicts)["ties"] == 1.0


def test_a_missing_verdict_is_a_half_and_counted() -> None:
    verdicts = torch.tensor([[NAN, 1.0, 1.0], [0.0, NAN, NAN], [0.0, 1.0, NAN]])
    assert_close(symmetric(verdicts)[1, 2], torch.tensor(0.25))
    assert_close(win_rates(verdicts), torch.tensor([1.0, 0.125, 0.375]))
    assert verdict_statistics(verdicts)["no_verdict"] == pytest.approx(1 / 6)


def test_a_sample_that_no_verdict_is_about_has_no_reward() -> None:
    verdicts = torch.tensor([[NAN, 1.0, NAN], [0.0, NAN, NAN], [NAN, NAN, NAN]])
    assert win_rates(verdicts).isnan().tolist() == [False, False, True]


def test_circles_are_counted_and_an_order_has_none() -> None:
    circle = torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])
    assert verdict_statistics(circle)["intransitive"] == 1.0
    strength = torch.arange(6.0)
    assert verdict_statistics(torch.sigmoid(strength[:, None] - strength[None, :]))["intransitive"] == 0.0


def test_the_bias_of_a_judge_that_favours_what_it_sees_first_is_found() -> None:
    gold = torch.linspace(-0.4, 0.4, 9, dtype=torch.float64)
    verdicts = torch.sigmoid(gold[:, None] - gold[None, :]) + 0.1
    assert verdict_statistics(verdicts)["order_bias"] == pytest.approx(0.1)


def test_what_is_no_square_or_no_group_is_refused() -> None:
    with pytest.raises(AlignkitError, match=r"\(G, G\)"):
        win_rates(torch.zeros(3, 2))
    with pytest.raises(AlignkitError, match="at least 2"):
        win_rates(torch.zeros(1, 1))
