"""What claims 13 and 14 train, and what their verdicts follow."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from recipes.mixture import claims_guidance as claims
from recipes.mixture.measure import log_prob
from recipes.mixture.noised import Linear, Quadratic, clean, exact, expected, posterior
from recipes.mixture.policy import MixturePolicy
from recipes.mixture.world import FOUR, Mixture, bimodal

LEAN = Mixture(means=((-1.0, 0.5), (1.5, 0.0)), std=0.4, shares=(0.3, 0.7))


@pytest.mark.parametrize("reward", [Linear((1.0, -0.5)), Quadratic((0.5, 0.5), 0.7)])
def test_noised_rewards_are_the_moments_of_what_a_noised_point_may_have_been(reward: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    x0 = LEAN.sample(400_000, rng).double()
    sigma, at = 0.5, torch.tensor([[0.3, 0.1]], dtype=torch.float64)
    # weights of Bayes' rule: the chance that this x0 was noised to `at`
    chance = (-(at - (1 - sigma) * x0).square().sum(1) / (2 * sigma**2)).softmax(0)
    level = torch.full((1,), sigma, dtype=torch.float64)
    assert float(expected(LEAN, reward, 2.0)(at, level, None)) == pytest.approx(
        2 * float((chance * reward(x0)).sum()), abs=0.01
    )
    assert float(exact(LEAN, reward, 2.0)(at, level, None)) == pytest.approx(
        float((chance * (2 * reward(x0)).exp()).sum().log()), abs=0.01
    )
    given = posterior(LEAN, at, level)
    mean = (given.log_shares.exp()[..., None] * given.means).sum(1)
    assert_close(mean, at - sigma * LEAN.velocity(at, sigma))
    assert_close(clean(reward, 2.0)(at, level, None), 2 * reward(at))


def test_without_noise_both_noised_rewards_are_the_reward() -> None:
    x, reward = FOUR.sample(5, torch.Generator()), Quadratic((0.5, 0.5), 0.7)
    for make in (exact, expected):
        assert_close(make(FOUR, reward, 2.0)(x, torch.zeros(5), None), 2 * reward(x))


def test_both_sides_of_a_pair_get_the_same_noise() -> None:
    """A reward linear in the point then sees the pair's own difference, shrunk by the level, whatever the noise."""
    winners, losers = torch.full((8, 2), 3.0), torch.zeros(8, 2)
    levels: list[Tensor] = []

    def line(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        levels.append(sigma)
        return x[:, 0]

    loss = claims.same_noise_pairs(winners, losers, True, line, torch.Generator())
    assert torch.equal(levels[0], levels[1]) and float(levels[0].std()) > 0.2
    assert_close(loss, -torch.nn.functional.logsigmoid(3.0 * (1 - levels[0])).mean())
    claims.same_noise_pairs(winners, losers, False, line, torch.Generator())
    assert bool((levels[-1] == 0).all())


@pytest.mark.parametrize(
    ("target", "least"), [(claims.log_mean_exp_target, exact), (claims.mean_target, expected)], ids=["log", "mean"]
)
def test_a_target_is_least_at_the_noised_reward_that_it_is_for(target: Any, least: Any) -> None:
    shape = Linear((0.6, 0.2))

    def loss(reward: Any) -> float:
        rng = torch.Generator().manual_seed(0)
        return sum(float(target(shape, 1.0, reward, rng)) for _ in range(60))

    def other(x: Tensor, sigma: Tensor, cond: Any, mine: float) -> Tensor:
        own, theirs = exact(FOUR, shape)(x, sigma, cond), expected(FOUR, shape)(x, sigma, cond)
        return own + mine * (theirs - own)

    losses = {mine: loss(partial(other, mine=mine)) for mine in (-0.5, 0.0, 0.5, 1.0, 1.5)}
    assert min(losses, key=lambda mine: losses[mine]) == (0.0 if least is exact else 1.0)


def test_the_density_of_unguided_points_is_that_of_the_flow() -> None:
    start = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    points, log_p = claims.drawn(claims.nothing, 0.0, start, steps=200)
    assert_close(log_p, log_prob(MixturePolicy(FOUR), points), atol=0.2, rtol=0.0)


def rows_13(gap: float) -> list[dict[str, Any]]:
    """Measurements in which the reward that has seen noise is `gap` above the other at every KL."""
    rows = []
    for seed in claims.SEEDS:
        for begin in claims.BEGINS:
            named = {"seed": seed, "begin": begin, "objective": 0.0}
            rows.append({**named, "arm": "none", "weight": 0.0, "reward": 0.38, "kl": 0.0})
            for arm in claims.ARMS:
                for w, kl in zip(claims.WEIGHTS, (0.1, 0.5, 2.0, 8.0), strict=True):
                    reward = 0.38 + 0.1 * kl + (gap + 0.001 * seed) * (arm == "noised")
                    rows.append({**named, "arm": arm, "weight": w, "reward": reward, "kl": kl})
    return rows


@pytest.mark.parametrize(("gap", "verdict"), [(0.1, "holds"), (0.0, "fails"), (-0.1, "fails")])
def test_the_verdict_on_noise_follows_the_gap_at_matched_kl(gap: float, verdict: str) -> None:
    assert claims._noise_needed(rows_13(gap), {}).verdict == verdict


def verdict_14(objective: float, reward: float) -> str:
    rows = [
        {
            "bed": bed,
            "target": target,
            "seed": seed,
            "kl": 1.0,
            "reward": 0.5 + 0.001 * seed * (target == "mean") + reward * (target == "mean"),
            "objective": 0.5 + 0.001 * seed + objective * (target == "log mean exp"),
        }
        for bed in claims.BEDS
        for target in claims.TARGETS
        for seed in claims.SEEDS
    ]
    return claims._targets(rows, {}).verdict


def test_the_verdict_on_targets_needs_another_reward_and_a_better_objective() -> None:
    assert verdict_14(0.1, 0.1) == "holds"
    assert verdict_14(-0.1, 0.1) == "undecided"
    assert verdict_14(0.1, -0.0005) == "fails"


def test_a_trained_reward_ranks_points_as_the_labels_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(claims.TRAIN, "updates", 150)
    pairs = claims.judged_pairs(1024, claims.TEMPERATURE, 0)
    reward = claims.trained(partial(claims.same_noise_pairs, *pairs, True), seed=0)
    x = FOUR.sample(400, torch.Generator().manual_seed(1))
    found = torch.corrcoef(torch.stack([reward(x, torch.zeros(400), None), bimodal(x)]))[0, 1]
    assert float(found) > 0.65
