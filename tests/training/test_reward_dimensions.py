"""Reward models of several dimensions: which pairs count for what, and pairs noised on any path."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from alignkit.errors import RecipeError
from alignkit.flow.path import VariancePreserving
from alignkit.training.examples import PairBatch, at_level
from alignkit.training.reward_losses import LOSSES
from alignkit.types import Prompt

DOUBLE = torch.float64


class FirstCoordinates(nn.Module):
    """Scores (B, 2): the first two coordinates, times what it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, dtype=DOUBLE))

    def forward(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        return self.scale * media[:, :2]


def pairs(preferred: list[list[int]]) -> PairBatch:
    rng = torch.Generator().manual_seed(0)
    winners, losers = (torch.randn(len(preferred), 4, generator=rng, dtype=DOUBLE) for _ in range(2))
    return PairBatch(winners, losers, [Prompt("")] * len(preferred), preferred=torch.tensor(preferred))


def test_each_dimension_has_its_own_bradley_terry_loss_over_the_pairs_that_count_for_it() -> None:
    """loss = sum over d of mask_d (-log sigmoid(r_w,d - r_l,d)), mean over pairs; written out as loops."""
    batch = pairs([[1, 0], [0, -1], [1, 1], [-1, 0]])
    loss, logs = LOSSES["bradley_terry_dimensions"](FirstCoordinates(), batch, torch.Generator())
    total, right = 0.0, []
    assert batch.preferred is not None
    for pair, said in enumerate(batch.preferred.tolist()):
        for d, sign in enumerate(said):
            if sign != 0:
                lead = sign * float(batch.winners[pair, d] - batch.losers[pair, d])
                total += float(torch.log1p(torch.exp(torch.tensor(-lead, dtype=DOUBLE))))
                right.append(lead > 0)
    assert_close(loss, torch.tensor(total / 4, dtype=DOUBLE))
    assert logs["accuracy"] == pytest.approx(sum(right) / len(right))


def test_what_a_pair_says_nothing_of_has_no_gradient() -> None:
    model = FirstCoordinates()
    LOSSES["bradley_terry_dimensions"](model, pairs([[1, 0], [-1, 0]]), torch.Generator())[0].backward()
    assert model.scale.grad is not None
    assert model.scale.grad[0] != 0 and model.scale.grad[1] == 0


def test_a_pair_turned_round_is_the_same_pair() -> None:
    batch = pairs([[1, -1], [0, 1]])
    assert batch.preferred is not None
    turned = PairBatch(batch.losers, batch.winners, batch.prompts, preferred=-batch.preferred)
    one, other = (
        LOSSES["bradley_terry_dimensions"](FirstCoordinates(), b, torch.Generator())[0] for b in (batch, turned)
    )
    assert_close(one, other)


@pytest.mark.parametrize("preferred", [None, [[1], [1]]])
def test_pairs_that_do_not_say_what_they_count_for_are_refused(preferred: list[list[int]] | None) -> None:
    batch = pairs([[1, 1], [1, 1]])
    batch = PairBatch(
        batch.winners, batch.losers, batch.prompts, preferred=None if preferred is None else torch.tensor(preferred)
    )
    with pytest.raises(RecipeError, match="both must be"):
        LOSSES["bradley_terry_dimensions"](FirstCoordinates(), batch, torch.Generator())


def test_latents_of_other_models_are_noised_on_their_path() -> None:
    x0, eps, sigma = torch.ones(3, 2), torch.full((3, 2), 5.0), torch.tensor([0.0, 0.6, 1.0])
    expected = torch.stack([(1 - s**2) ** 0.5 * x + s * e for x, e, s in zip(x0, eps, sigma, strict=True)])
    assert_close(at_level(x0, eps, sigma, VariancePreserving()), expected, rtol=0, atol=1e-4)
    batch = PairBatch(x0, x0 + 1, [Prompt("")] * 3, path=VariancePreserving())
    noised = batch.noised(0.6, 0.6, torch.Generator().manual_seed(0))
    assert_close(noised.losers - noised.winners, torch.full((3, 2), 0.8))
    assert noised.sigma is not None and noised.path == batch.path


def test_a_batch_moves_with_all_that_it_has() -> None:
    batch = pairs([[1, 0]]).noised(0.1, 0.9, torch.Generator().manual_seed(0)).to(torch.device("meta"))
    assert batch.preferred is not None and batch.sigma is not None
    assert {one.device.type for one in (batch.winners, batch.losers, batch.preferred, batch.sigma)} == {"meta"}
