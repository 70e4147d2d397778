"""Particles: their weights against the published loop, resampling against its definition, and an exact small chain."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.distributions import Normal
from torch.testing import assert_close

from alignkit.errors import RecipeError
from alignkit.flow import particles
from alignkit.flow.particles import (
    RESAMPLINGS,
    Weights,
    after_resampling,
    ancestors_of,
    completed,
    effective_size,
    equal_weights,
    log_potential,
    systematic,
    tempered,
    tempering_rate,
    twist,
    uneven,
    unscored,
    weighed,
)

MOVING: Any = ("diff", "max", "add", "rt")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def published(potential: str, rewards: list[list[float]], ancestors: list[list[int]], strength: float) -> list[float]:
    """The last weights of one prompt, as the published loop has them (methods.md 6.5; resampled at every moment)."""
    count = len(rewards[0])
    before, product = [0.0] * count, [1.0] * count
    for moment, (seen, whose) in enumerate(zip(rewards, ancestors, strict=True)):
        last, r, w = moment == len(rewards) - 1, list(seen), [0.0] * count
        for k in range(count):
            if potential == "diff":
                w[k] = math.exp(strength * (r[k] - before[k]))
            elif potential == "max":
                r[k] = r[k] if last else max(r[k], before[k])
                w[k] = math.exp(strength * r[k])
            elif potential == "add":
                r[k] = r[k] if last else r[k] + before[k]
                w[k] = math.exp(strength * r[k])
            else:
                w[k] = math.exp(strength * r[k])
            if last and potential in ("max", "add", "rt"):
                w[k] = math.exp(strength * r[k]) / product[k]
        if last:
            return w
        product = [product[k] * w[k] for k in whose]
        before = [r[k] for k in whose]
    return []


@pytest.mark.parametrize("potential", MOVING)
def test_weights_are_those_of_the_published_loop(potential: Any) -> None:
    rewards, strength = drawn(4, 1, 3), 1.7
    ancestors = [[0, 0, 2], [1, 2, 2], [2, 0, 1], [0, 1, 2]]
    weights = equal_weights(potential, 1, 3)
    for moment in range(3):
        weights = weighed(weights, potential, rewards[moment], strength)
        weights = after_resampling(weights, torch.tensor([ancestors[moment]]), torch.tensor([True]))
    last = completed(weights, potential, rewards[3], strength).log_weights - weights.log_weights
    expected = published(potential, rewards[:, 0].tolist(), ancestors, strength)
    assert_close(last.exp()[0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("potential", [*MOVING, "is"])
def test_without_resampling_the_weights_end_as_exp_of_strength_times_reward(potential: Any) -> None:
    rewards = drawn(4, 5, 6) - 0.5
    weights = equal_weights(potential, 5, 6)
    for seen in rewards[:3]:
        weights = weighed(weights, potential, seen, 3.0)
    assert_close(completed(weights, potential, rewards[3], 3.0).log_weights, 3.0 * rewards[3])


def test_bon_leaves_weight_to_the_best_only() -> None:
    reward = torch.tensor([[0.1, math.nan, 0.9, 0.3]], dtype=torch.float64)
    done = completed(weighed(equal_weights("bon", 1, 4), "bon", reward, 2.0), "bon", reward, 2.0)
    assert_close(done.log_weights.softmax(1), torch.tensor([[0.0, 0.0, 1.0, 0.0]], dtype=torch.float64))


def test_max_of_negative_rewards_is_not_cut_off_at_zero() -> None:
    reward = torch.tensor([[-3.0, -1.0]], dtype=torch.float64)
    weights = weighed(equal_weights("max", 1, 2), "max", reward, 1.0)
    assert_close(weights.log_weights, reward)


def test_an_unknown_potential_is_refused_with_the_known_ones() -> None:
    unknown: Any = "sum"
    with pytest.raises(RecipeError, match="diff, max, add, rt, is, bon"):
        log_potential(unknown, drawn(1, 2), drawn(1, 2))


# rewards that could not be computed


def test_a_particle_without_reward_has_weight_zero_and_is_never_copied() -> None:
    reward = torch.tensor([[0.2, math.nan, 0.1, 0.4]], dtype=torch.float64)
    weights = weighed(equal_weights("diff", 1, 4), "diff", reward, 1.0)
    assert weights.log_weights[0, 1] == -math.inf
    for kind in RESAMPLINGS:
        for seed in range(20):
            rng = [torch.Generator().manual_seed(seed)]
            chosen = ancestors_of(kind, weights.log_weights, torch.tensor([True]), rng)  # type: ignore[arg-type]
            assert 1 not in chosen.tolist()[0]


def test_a_prompt_without_any_reward_keeps_its_weights_and_is_counted() -> None:
    reward = torch.tensor([[math.nan, math.nan], [1.0, 2.0]], dtype=torch.float64)
    before = weighed(equal_weights("diff", 2, 2), "diff", torch.tensor([[0.0, 1.0], [0.0, 1.0]]), 1.0)
    after = weighed(before, "diff", reward, 1.0)
    for name in ("log_weights", "spent", "memory"):
        assert_close(getattr(after, name)[0], getattr(before, name)[0])
    assert unscored(reward).tolist() == [True, False]
    assert_close(after.log_weights[1], reward[1])


def test_weights_stay_finite_where_the_only_particle_left_loses_its_reward() -> None:
    half = weighed(equal_weights("diff", 1, 2), "diff", torch.tensor([[math.nan, 1.0]]), 1.0)
    after = weighed(half, "diff", torch.tensor([[1.0, math.nan]]), 1.0)
    assert_close(after.log_weights.softmax(1), torch.tensor([[0.0, 1.0]], dtype=torch.float64))


# when to resample, and how


def test_effective_size_is_that_of_kish() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]).double()
    assert_close(effective_size(weights.log() + 7.0), torch.tensor([1 / 0.375, 4.0, 1.0]).double())


@pytest.mark.parametrize("count", [1, 3, 7, 10, 49])
def test_equal_weights_are_never_resampled_and_others_are_at_a_share_of_one(count: int) -> None:
    assert not uneven(torch.full((1, count), -3.7, dtype=torch.float64), 1.0).any()
    if count > 1:
        assert uneven(drawn(1, count), 1.0).all()


def many(kind: str, shares: torch.Tensor, groups: int) -> torch.Tensor:
    """(groups, K) how many copies each particle got."""
    uniform = drawn(groups, len(shares), seed=3)
    chosen = RESAMPLINGS[kind](shares.expand(groups, -1).contiguous(), uniform)
    return torch.nn.functional.one_hot(chosen, len(shares)).sum(1).double()


@pytest.mark.parametrize("kind", list(RESAMPLINGS))
def test_every_particle_gets_its_share_of_copies_on_average(kind: str) -> None:
    shares = torch.tensor([0.37, 0.0, 0.05, 0.21, 0.3, 0.07], dtype=torch.float64)
    copies = many(kind, shares, 40_000)
    assert bool((copies.sum(1) == 6).all())
    error = copies.std(dim=0) / 200.0
    assert bool(((copies.mean(0) - 6 * shares).abs() <= 4 * error).all())


@pytest.mark.parametrize("kind", ["systematic", "ssp"])
def test_copies_are_floor_or_ceil_of_the_share_and_vary_less_than_independent_draws(kind: str) -> None:
    shares = torch.tensor([0.37, 0.0, 0.05, 0.21, 0.3, 0.07], dtype=torch.float64)
    copies = many(kind, shares, 20_000)
    assert bool(((copies - 6 * shares).abs() < 1.0).all())
    independent = many("multinomial", shares, 20_000)
    some = shares > 0
    assert bool((copies.var(dim=0)[some] < 0.85 * independent.var(dim=0)[some]).all())


@pytest.mark.parametrize("kind", ["systematic", "ssp"])
def test_equal_weights_give_one_copy_each(kind: str) -> None:
    for count in (1, 2, 7, 49):
        chosen = RESAMPLINGS[kind](torch.full((3, count), 1.0 / count, dtype=torch.float64), drawn(3, count))
        assert chosen.tolist() == [list(range(count))] * 3


@pytest.mark.parametrize("kind", list(RESAMPLINGS))
def test_the_largest_uniform_number_never_chooses_a_particle_without_weight(kind: str) -> None:
    shares = torch.tensor([[0.1] * 9 + [0.1 - 1e-16, 0.0]], dtype=torch.float64)
    uniform = torch.full_like(shares, particles.NOT_ABOVE)
    assert int(RESAMPLINGS[kind](shares, uniform).max()) <= 9


def test_only_prompts_to_be_resampled_draw_and_each_from_its_own_generator() -> None:
    log_weights, rows = drawn(3, 5) * 4, torch.tensor([True, False, True])
    together = [torch.Generator().manual_seed(s) for s in range(3)]
    chosen = ancestors_of("multinomial", log_weights, rows, together)
    assert chosen[1].tolist() == list(range(5))
    assert torch.equal(together[1].get_state(), torch.Generator().manual_seed(1).get_state())
    alone = ancestors_of("multinomial", log_weights[2:], rows[2:], [torch.Generator().manual_seed(2)])
    assert_close(chosen[2:], alone)


# a chain that can be counted out: x1 in {0, 1}, then x2 in {0, 1}; clean estimates are scored at x1 and at x2

FIRST = torch.tensor([0.5, 0.5], dtype=torch.float64)
SECOND = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)
AT_FIRST = torch.tensor([1.0, 3.0], dtype=torch.float64).log()
AT_SECOND = torch.tensor([1.0, 9.0], dtype=torch.float64).log()
AT_END = torch.tensor([2.0, 5.0], dtype=torch.float64).log()


def resampled_every_way(weights: Weights, x: torch.Tensor, chance: torch.Tensor, share: float):
    """Both outcomes of systematic resampling of two particles, each with its exact probability: the outcome changes
    only where the uniform number crosses the fractional part of twice the first weight."""
    shares = weights.log_weights.softmax(1)
    edge = (2.0 * shares[:, :1]) % 1.0
    rows = uneven(weights.log_weights, share)
    pieces = []
    for uniform, part in ((edge / 2.0, edge), ((1.0 + edge) / 2.0, 1.0 - edge)):
        chosen = torch.where(rows[:, None], systematic(shares, uniform), torch.arange(2))
        after = after_resampling(weights, chosen, rows)
        pieces.append((after, x.gather(1, chosen), chance * part[:, 0]))
    both = [torch.cat([getattr(one[0], name) for one in pieces]) for name in ("log_weights", "spent", "memory")]
    return Weights(*both), torch.cat([one[1] for one in pieces]), torch.cat([one[2] for one in pieces])


def chain(potential: Any, share: float, forgetful: bool = False) -> torch.Tensor:
    """(2,) exact E[mean weight * share of particles at x2 = 0 and 1] of two particles, over all that can happen."""
    pairs = torch.tensor(list(itertools.product((0, 1), repeat=2)))
    x, chance = pairs, FIRST[pairs].prod(1)
    weights = weighed(equal_weights(potential, len(x), 2), potential, AT_FIRST[x], 1.0)
    weights, x, chance = resampled_every_way(weights, x, chance, share)
    if forgetful:
        weights = Weights(torch.zeros_like(weights.log_weights), weights.spent, weights.memory)
    nexts = pairs.repeat(len(x), 1)
    x, chance = x.repeat_interleave(4, 0), chance.repeat_interleave(4)
    weights = Weights(*(w.repeat_interleave(4, 0) for w in (weights.log_weights, weights.spent, weights.memory)))
    chance, x = chance * SECOND[x, nexts].prod(1), nexts
    weights, x, chance = resampled_every_way(weighed(weights, potential, AT_SECOND[x], 1.0), x, chance, share)
    last = completed(weights, potential, AT_END[x], 1.0).log_weights.exp()
    at = torch.stack([last * (x == state) for state in (0, 1)], dim=-1)
    return (chance[:, None] * at.mean(1)).sum(0)


EXACT = (FIRST @ SECOND) * AT_END.exp()


@pytest.mark.parametrize("potential", [*MOVING, "is"])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_expectations_are_exact_however_often_particles_are_resampled(potential: Any, share: float) -> None:
    assert_close(chain(potential, share), EXACT)


def test_the_chain_with_a_threshold_resamples_sometimes_and_not_always() -> None:
    first = weighed(equal_weights("diff", 1, 2), "diff", AT_FIRST[None], 1.0)
    second = weighed(first, "diff", AT_SECOND[None], 1.0)
    assert not uneven(first.log_weights, 0.7).any()
    assert uneven(second.log_weights, 0.7).all()


def test_forgetting_weights_where_nothing_was_resampled_is_biased_as_published() -> None:
    assert_close(chain("diff", 1.0, forgetful=False), EXACT)
    biased = chain("diff", 0.7, forgetful=True)
    assert bool(((biased / EXACT - 1.0).abs() > 0.05).any())


# DAS


def test_tempering_starts_at_zero_never_falls_and_ends_at_one() -> None:
    gamma = tempering_rate(28)
    levels = [tempered(i, gamma) for i in range(29)]
    assert levels[0] == 0.0
    assert levels == sorted(levels)
    assert_close(levels[-1], 1.0)
    assert_close(tempered(3, 0.008), 1.008**3 - 1.0)
    assert tempered(100, 0.008) == 1.0


def test_twist_is_the_ratio_of_both_densities_over_the_free_positions() -> None:
    x, mean, shift = (drawn(3, 2, 4, seed=s) for s in range(3))
    mask = torch.ones(1, 1, 4)
    mask[..., 3] = 0
    std = torch.tensor(0.3, dtype=torch.float64)
    ratio = Normal(mean, std).log_prob(x) - Normal(mean + shift, std).log_prob(x)
    assert_close(twist(x, mean, shift, std), ratio.sum((1, 2)))
    assert_close(twist(x, mean, shift, std, mask), ratio[..., :3].sum((1, 2)))
