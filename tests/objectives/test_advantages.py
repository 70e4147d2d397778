from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from alignkit.errors import AlignkitError, RecipeError
from alignkit.objectives.advantages import (
    group_advantages,
    group_statistics,
    per_reward_advantages,
    quasi_norm,
)

NAN = float("nan")


def batch(groups=4, size=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    rewards = torch.rand(groups * size, generator=rng, dtype=torch.float64)
    order = torch.randperm(groups * size, generator=rng)
    return rewards, torch.arange(groups).repeat_interleave(size)[order]


def literal(rewards, groups, scale):
    """Flow-GRPO's PerPromptStatTracker, written out with numpy's population std."""
    out = torch.zeros_like(rewards)
    for group in groups.unique():
        own = rewards[groups == group]
        centred = own - own.mean()
        if scale == "group":
            centred = centred / (own.std(correction=0) + 1e-4)
        if scale == "batch":
            centred = centred / (rewards.std(correction=0) + 1e-4)
        out[groups == group] = centred
    return out


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_the_formula_in_any_order_of_samples(scale):
    rewards, groups = batch()
    advantages, live = group_advantages(rewards, groups, scale)
    assert_close(advantages, literal(rewards, groups, scale))
    assert live.all() and live.dtype == torch.bool


def test_group_ids_are_names_and_not_positions():
    rewards, groups = batch()
    renamed = groups * 7_000_000_000_000 - 3
    assert torch.equal(group_advantages(rewards, renamed)[0], group_advantages(rewards, groups)[0])


def test_a_group_does_not_depend_on_the_others():
    rewards, groups = batch()
    own = groups == 2
    whole = group_advantages(rewards, groups)[0][own]
    assert_close(group_advantages(rewards[own], groups[own])[0], whole)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.3, 26.4])
def test_a_group_of_equal_rewards_is_masked_and_never_amplified(scale, value):
    rewards = torch.tensor([value, value, value, 0.0, 1.0, 0.5])
    rewards[1] = torch.nextafter(rewards[1], torch.tensor(100.0))  # rounding of the reward model
    advantages, live = group_advantages(rewards, torch.tensor([0, 0, 0, 1, 1, 1]), scale)
    assert live.tolist() == [False, False, False, True, True, True]
    assert torch.equal(advantages[:3], torch.zeros(3))
    assert advantages[4] > 0


def test_a_small_but_real_difference_is_kept():
    _, live = group_advantages(torch.tensor([0.5, 0.50001]), torch.tensor([0, 0]))
    assert live.all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_an_unscored_sample_leaves_the_statistics_and_gets_no_advantage(scale):
    rewards, groups = batch()
    with_failure = torch.cat([rewards, torch.tensor([NAN], dtype=torch.float64)])
    advantages, live = group_advantages(with_failure, torch.cat([groups, groups[:1]]), scale)
    assert_close(advantages[:-1], group_advantages(rewards, groups, scale)[0])
    assert float(advantages[-1]) == 0.0 and not live[-1] and live[:-1].all()


def test_groups_with_one_or_no_scored_sample_carry_no_signal():
    rewards, groups = torch.tensor([NAN, NAN, 0.7, NAN]), torch.tensor([0, 0, 1, 1])
    for scale in ("group", "batch", "none"):
        advantages, live = group_advantages(rewards, groups, scale)
        assert torch.equal(advantages, torch.zeros(4)) and not live.any()


def test_the_clip_bounds_the_advantages():
    rewards = torch.zeros(50)
    rewards[0] = 1.0
    advantages, _ = group_advantages(rewards, torch.zeros(50, dtype=torch.int64), clip=5.0)
    assert float(advantages[0]) == 5.0


def test_each_reward_pulls_by_its_weight_and_not_by_its_scale():
    small, groups = batch(seed=1)
    large = batch(seed=2)[0] * 100.0
    weights = {"small": 1.0, "large": 1.0}
    advantages, _ = per_reward_advantages({"small": small, "large": large}, weights, groups)
    rescaled, _ = per_reward_advantages({"small": small, "large": large / 100}, weights, groups)
    assert_close(advantages, rescaled, atol=2e-3, rtol=0)
    literal_sum = literal(small, groups, "group") + literal(large, groups, "group")
    want = (literal_sum - literal_sum.mean()) / (literal_sum.std(correction=0) + 1e-4)
    assert_close(advantages, want)
    # A plain sum follows the large one only.
    raw, _ = group_advantages(small + large, groups)
    correlation = torch.corrcoef(torch.stack([raw, literal(large, groups, "group")]))[0, 1]
    assert correlation > 0.999
    assert torch.corrcoef(torch.stack([advantages, literal(small, groups, "group")]))[0, 1] > 0.5


def test_without_batch_normalisation_the_sum_is_plain():
    first, groups = batch(seed=1)
    second = batch(seed=2)[0]
    weights = {"a": 0.8, "b": -0.2}
    found, _ = per_reward_advantages({"a": first, "b": second}, weights, groups, batch_normalise=False)
    assert_close(found, 0.8 * literal(first, groups, "group") - 0.2 * literal(second, groups, "group"))


def test_a_reward_that_failed_for_a_sample_leaves_the_other_reward_working():
    groups = torch.tensor([0, 0, 1, 1])
    parts = {"a": torch.tensor([NAN, 1.0, 0.2, 0.2]), "b": torch.tensor([0.0, 1.0, NAN, 3.0])}
    advantages, live = per_reward_advantages(parts, {"a": 1.0, "b": 1.0}, groups, batch_normalise=False)
    assert live.tolist() == [True, True, False, False]
    assert_close(advantages, torch.tensor([-1.0, 1.0, 0.0, 0.0]), atol=1e-3, rtol=0)


def test_a_reward_of_weight_zero_does_not_make_a_group_live():
    parts = {"a": torch.tensor([0.5, 0.5]), "watched": torch.tensor([0.0, 1.0])}
    advantages, live = per_reward_advantages(parts, {"a": 1.0, "watched": 0.0}, torch.tensor([0, 0]))
    assert not live.any() and torch.equal(advantages, torch.zeros(2))


def test_quasi_norm_divides_by_the_p_norm_of_the_group():
    rewards, groups = batch()
    centred = literal(rewards, groups, "none")
    found = quasi_norm(centred, groups, p=0.8)
    for group in groups.unique():
        own = centred[groups == group]
        assert_close(found[groups == group], own / (own.abs() ** 0.8).sum() ** (1 / 0.8))
    assert torch.equal(quasi_norm(torch.zeros(3), torch.zeros(3, dtype=torch.int64)), torch.zeros(3))


def test_group_statistics_count_flat_groups_and_failures():
    rewards = torch.tensor([0.5, 0.5, 0.0, 1.0, NAN, NAN, NAN, 0.3])
    statistics = group_statistics(rewards, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    assert statistics["groups"] == 4
    assert statistics["zero_std_fraction"] == 0.75
    assert statistics["valid_fraction"] == 5 / 8
    assert statistics["group_std"] == pytest.approx(0.5 / 3)


@pytest.mark.parametrize(
    "rewards, groups, error, message",
    [
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), AlignkitError, r"must both be \(B,\)"),
        (torch.zeros(3), torch.zeros(2, dtype=torch.int64), AlignkitError, r"must both be \(B,\)"),
        (torch.zeros(3), torch.zeros(3), AlignkitError, "integer ids"),
        (torch.tensor([0.0, float("inf")]), torch.tensor([0, 0]), AlignkitError, "infinite"),
    ],
)
def test_impossible_inputs_are_refused(rewards, groups, error, message):
    with pytest.raises(error, match=message):
        group_advantages(rewards, groups)


def test_unknown_scales_and_mismatched_names_are_refused():
    rewards, groups = batch()
    with pytest.raises(RecipeError, match="group, batch, none"):
        group_advantages(rewards, groups, "std")  # pyright: ignore
    with pytest.raises(RecipeError, match="same names"):
        per_reward_advantages({"a": rewards}, {"b": 1.0}, groups)
