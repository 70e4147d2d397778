"""Transforms of rewards and advantages, against their formulas written out with loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from alignkit.errors import AlignkitError, RecipeError
from alignkit.objectives.shaping import (
    diversity_shaping,
    gated,
    group_quantile,
    hybrid,
    log_sigmoid,
    nearest_distance,
    proxy_uncertainty,
    quantile_stretch,
    uncertainty_weighted,
)

NAN = float("nan")


def batch(groups: int = 4, size: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and shuffled group ids."""
    rng = torch.Generator().manual_seed(seed)
    rewards = torch.randn(groups * size, generator=rng, dtype=torch.float64)
    order = torch.randperm(groups * size, generator=rng)
    return rewards, (torch.arange(groups).repeat_interleave(size) * 10**12)[order]


def test_the_log_sigmoid_is_its_formula_and_survives_rewards_far_from_the_reference() -> None:
    rewards, groups = batch()
    reference = groups.double() / 10**13
    written_out = [math.log(1 / (1 + math.exp(-(r - c) / 0.3))) for r, c in zip(rewards.tolist(), reference.tolist())]
    assert_close(log_sigmoid(rewards, reference, 0.3), torch.tensor(written_out, dtype=torch.float64))
    far = log_sigmoid(torch.tensor([-1e4, 1e4, NAN]), torch.zeros(3))
    assert far[:2].tolist() == [-1e4, 0.0] and far[2].isnan()


def test_above_the_reference_the_log_sigmoid_has_little_left_to_give() -> None:
    steps = log_sigmoid(torch.tensor([-3.0, -2.0, 2.0, 3.0], dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    assert float(steps[1] - steps[0]) > 0.9
    assert float(steps[3] - steps[2]) < 0.1


def test_the_quantile_of_a_group_is_numpys_over_its_scored_samples() -> None:
    rewards, groups = batch()
    rewards[3] = NAN
    found = group_quantile(rewards, groups, 0.85)
    for group in groups.unique():
        own = rewards[groups == group].numpy()
        assert_close(found[groups == group], torch.full((6,), float(np.nanquantile(own, 0.85)), dtype=torch.float64))
    assert group_quantile(torch.tensor([NAN, NAN]), torch.tensor([1, 1]), 0.5).isnan().all()


def test_the_stretch_spreads_ranks_evenly_and_ties_share_theirs() -> None:
    found = quantile_stretch(torch.tensor([0.30, 0.31, 0.31, 9.0, 5.0, NAN]), torch.tensor([0, 0, 0, 0, 1, 1]))
    assert_close(found, torch.tensor([0.0, 0.5, 0.5, 1.0, 0.5, NAN]), equal_nan=True)


def test_the_stretch_is_the_same_for_every_increasing_function_of_the_reward() -> None:
    rewards, groups = batch()
    assert_close(quantile_stretch(torch.tanh(rewards / 8) * 1e-3, groups), quantile_stretch(rewards, groups))
    clustered = quantile_stretch(0.5 + 1e-9 * rewards, groups)
    assert_close(clustered[groups == 0].sort().values, torch.linspace(0, 1, 6, dtype=torch.float64))


def test_a_gate_lets_pass_or_not_and_what_was_not_computed_stays_so() -> None:
    rewards, gate = torch.tensor([0.9, 0.9, 0.9, NAN]), torch.tensor([0.5, 0.49, NAN, 1.0])
    assert_close(gated(rewards, gate, 0.5, below=-1.0), torch.tensor([0.9, -1.0, NAN, NAN]), equal_nan=True)


def test_a_hybrid_is_the_mean_by_confidence_and_one_that_is_missing_leaves_the_other() -> None:
    model, rule = torch.tensor([0.2, 0.2, NAN, NAN, 0.2]), torch.tensor([1.0, NAN, 0.7, NAN, 0.8])
    trust = torch.tensor([3.0, 3.0, 3.0, 3.0, 0.0])
    wanted = torch.tensor([(3 * 0.2 + 1.0) / 4, 0.2, 0.7, NAN, 0.8])
    assert_close(hybrid(model, rule, trust, 1.0), wanted, equal_nan=True)
    with pytest.raises(AlignkitError, match="at least 0"):
        hybrid(model, rule, -1.0, 1.0)


def test_the_uncertainty_that_minimises_the_weighted_loss_is_the_log_of_the_loss() -> None:
    loss = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    uncertainty = loss.log().requires_grad_()
    value = uncertainty_weighted(loss, uncertainty)
    assert_close(value.detach(), 1 + loss.log())
    value.sum().backward()
    assert_close(uncertainty.grad, torch.zeros(3, dtype=torch.float64))
    assert_close(uncertainty_weighted(loss, torch.zeros(3, dtype=torch.float64)), loss)


def test_what_only_the_trained_reward_likes_is_uncertain() -> None:
    rng = torch.Generator().manual_seed(0)
    proxy = torch.randn(9, generator=rng, dtype=torch.float64)
    others = [torch.randn(9, generator=rng, dtype=torch.float64) for _ in range(2)]

    def beaten(rewards: torch.Tensor, i: int) -> float:
        return sum(float(rewards[i] > rewards[j]) + 0.5 * float(rewards[i] == rewards[j]) for j in range(9) if j != i)

    written_out = [beaten(proxy, i) / 8 - sum(beaten(o, i) / 8 for o in others) / 2 for i in range(9)]
    assert_close(proxy_uncertainty(proxy, others), torch.tensor(written_out, dtype=torch.float64))
    assert_close(proxy_uncertainty(proxy, [proxy * 3]), torch.zeros(9, dtype=torch.float64))
    hacked = others[0].clone()
    hacked[4] = 100.0
    assert int(proxy_uncertainty(hacked, [others[0] - torch.eye(9, dtype=torch.float64)[4] * 100]).argmax()) == 4


def test_diversity_multiplies_only_what_is_good_by_the_distance_to_its_nearest() -> None:
    advantages, groups = batch()
    features = torch.randn(24, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = diversity_shaping(advantages, features, groups)
    for i in range(24):
        others = [j for j in range(24) if j != i and groups[j] == groups[i]]
        nearest = min(1 - float(torch.cosine_similarity(features[i], features[j], dim=0)) for j in others)
        factor = nearest if advantages[i] > 0 else 1.0
        assert float(found[i]) == pytest.approx(float(advantages[i]) * factor, abs=1e-12)


def test_a_copy_of_a_good_sample_counts_nothing_and_difference_alone_is_never_rewarded() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.2]])
    shaped = diversity_shaping(torch.tensor([1.0, 1.0, 1.0, -1.0]), features, torch.zeros(4, dtype=torch.int64))
    assert_close(shaped, torch.tensor([0.0, 0.0, 1 - 0.2 / 1.04**0.5, -1.0]))
    assert nearest_distance(features[:1], torch.tensor([3])).tolist() == [1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_sigmoid(torch.zeros(2), torch.zeros(2), 0.0), "scale=0"),
        (lambda: group_quantile(torch.zeros(2), torch.zeros(2, dtype=torch.int64), 85), "quantile=85"),
        (lambda: proxy_uncertainty(torch.zeros(2), []), "at least one auxiliary"),
        (lambda: nearest_distance(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64)), r"must be \(B, D\)"),
    ],
)
def test_impossible_arguments_are_refused(call, message: str) -> None:
    with pytest.raises((RecipeError, AlignkitError), match=message):
        call()
