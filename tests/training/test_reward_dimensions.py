"""Reward models of several dimensions: which pairs count for what, and pairs noised on any path."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from alignkit.errors import DataError, RecipeError
from alignkit.flow.path import VariancePreserving
from alignkit.training.examples import PairBatch, at_level
from alignkit.training.reward_losses import LOSSES, pair_accuracy
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


LABELS = torch.tensor([[1, 0], [-1, 22], [22, 22], [0, 1]])


def labelled() -> PairBatch:
    rng = torch.Generator().manual_seed(0)
    first, second = (torch.randn(4, 4, generator=rng, dtype=DOUBLE) for _ in range(2))
    return PairBatch.of_labels(first, second, [Prompt("")] * 4, LABELS)


def test_labels_of_people_come_back_from_a_batch() -> None:
    assert torch.equal(labelled().labels, LABELS)
    wins = PairBatch(torch.zeros(2, 1), torch.zeros(2, 1), [Prompt("")] * 2, ties=torch.tensor([False, True]))
    assert wins.labels.tolist() == [[1], [0]]


def test_bradley_terry_with_ties_is_the_mean_over_valid_labels() -> None:
    """-log sigmoid(lead - log 5) for a win, both and -log 24 for a tie; written out as loops."""
    batch, parts = labelled(), []
    log_sigmoid = torch.nn.functional.logsigmoid
    for pair, said in enumerate(LABELS.tolist()):
        for d, label in enumerate(said):
            lead, k = batch.winners[pair, d] - batch.losers[pair, d], torch.tensor(5.0, dtype=DOUBLE)
            if label == 0:
                parts.append(-log_sigmoid(lead - k.log()) - log_sigmoid(-lead - k.log()) - torch.log(k**2 - 1))
            elif label != 22:
                parts.append(-log_sigmoid(label * lead - k.log()))
    loss, logs = LOSSES["bradley_terry_ties"](FirstCoordinates(), batch, torch.Generator())
    assert len(parts) == 5
    assert_close(loss, torch.stack(parts).mean())
    assert logs.keys() == {"accuracy_0", "accuracy_1"}


def test_bradley_terry_without_ties_leaves_ties_and_missing_labels_out() -> None:
    first, second = labelled().winners, labelled().losers
    same = PairBatch(first, second, labelled().prompts, preferred=torch.tensor([[1, 0], [-1, 0], [0, 0], [0, 1]]))
    found, expected = (
        LOSSES["bradley_terry_dimensions"](FirstCoordinates(), b, torch.Generator())[0] for b in (labelled(), same)
    )
    assert_close(found, expected)


def test_labels_that_fit_no_scores_or_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"scores of \(4, 2\) and labels of \(4, 1\)"):
        plain = PairBatch(torch.zeros(4, 2), torch.zeros(4, 2), [Prompt("")] * 4)
        LOSSES["bradley_terry_ties"](FirstCoordinates(), plain, torch.Generator())
    for labels, words in (
        (torch.tensor([[1], [2]]), r"holding \[2\]"),
        (torch.ones(2), r"shape \(2,\); expected \(2, d"),
    ):
        with pytest.raises(DataError, match=words):
            PairBatch.of_labels(torch.zeros(2, 1), torch.zeros(2, 1), [Prompt("")] * 2, labels)


def test_a_batch_without_a_valid_label_moves_nothing() -> None:
    first = torch.ones(4, 2, requires_grad=True)
    none = PairBatch.of_labels(first, torch.zeros(4, 2), [Prompt("")] * 4, torch.full((4, 2), 22))
    loss, logs = LOSSES["bradley_terry_ties"](FirstCoordinates(), none, torch.Generator())
    loss.backward()
    assert loss.item() == 0.0 and logs == {} and first.grad is not None and not first.grad.any()


@pytest.mark.parametrize("loss", ["bradley_terry", "softmax_preference"])
def test_losses_of_winners_refuse_pairs_whose_second_may_be_the_better(loss: str) -> None:
    said = PairBatch(torch.zeros(2, 2), torch.ones(2, 2), [Prompt("")] * 2, preferred=-torch.ones(2, 2).long())
    with pytest.raises(RecipeError, match=f'loss="{loss}" takes the first of a pair for the winner'):
        LOSSES[loss](FirstCoordinates(), said, torch.Generator())
    with pytest.raises(RecipeError, match="pair_accuracy takes the first of a pair for the winner"):
        pair_accuracy(FirstCoordinates(), said)
