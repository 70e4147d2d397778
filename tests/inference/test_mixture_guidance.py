"""Noisy reward guidance on a mixture of two Gaussians where everything is known, through the method itself.

The numbers are those of a computation without this package: exact velocity, 200 steps, 20,000 points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from alignkit.flow.plan import deterministic
from alignkit.inference.gradients import DPS, NRG
from alignkit.inference.guide import run
from alignkit.inference.judges import Judges
from alignkit.inference.method import Method
from alignkit.inference.steering import noisy_reward_steering
from alignkit.inference.task import Task
from alignkit.types import Prompt
from recipes.mixture.claims_guidance import drawn
from recipes.mixture.measure import tilted
from recipes.mixture.noised import Linear, NoisedReward, Quadratic, clean, exact, expected, tilted_moments
from recipes.mixture.policy import MixturePolicy
from recipes.mixture.world import FOUR, Mixture, linear

LINE = Mixture(means=((-2.0,), (2.0,)))
LINEAR, QUADRATIC = Linear((1.0,)), Quadratic((1.0,), 2.0)
COUNT = 400


class PointsReward:
    """A differentiable reward of clean points."""

    name, kind, differentiable = "points", "latent", True

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.function(media)


def guided(method: Method, reward: Any, budget: float = 1.0, steps: int = 100) -> Tensor:
    """(COUNT,) points of the line."""
    policy = MixturePolicy(LINE)
    task = Task(policy, Judges(reward), steps, budget, batch=COUNT)
    cond = policy.condition(["p"] * COUNT, steps)
    return run(method, task, cond, [torch.Generator().manual_seed(i) for i in range(COUNT)]).latents[:, 0]


def moments(points: Tensor) -> tuple[float, float, float]:
    """Share right of 0; mean and standard deviation there."""
    right = points[points > 0]
    return len(right) / len(points), float(right.mean()), float(right.std())


def test_the_right_noised_reward_of_a_linear_one_draws_the_tilt() -> None:
    _, share, mean = tilted_moments(LINE, LINEAR, 1.0)
    assert (share, mean) == (pytest.approx(0.982, abs=5e-4), pytest.approx(2.122, abs=1e-3))
    found = moments(guided(NRG(), NoisedReward(exact(LINE, LINEAR))))
    assert found[0] == pytest.approx(0.982, abs=0.015)
    assert found[1] == pytest.approx(2.113, abs=0.05)
    assert found[2] == pytest.approx(0.35, abs=0.04)


def test_the_mean_reward_of_noised_points_overshoots_the_tilt() -> None:
    _, mean, std = moments(guided(NRG(), NoisedReward(expected(LINE, LINEAR))))
    assert mean == pytest.approx(2.415, abs=0.04)
    assert std == pytest.approx(0.268, abs=0.03)


def test_a_clean_reward_asked_about_noised_points_leaves_the_data() -> None:
    share, mean, _ = moments(guided(NRG(), NoisedReward(clean(LINEAR)), steps=200))
    assert share == 1.0
    assert mean == pytest.approx(3.89, abs=0.05)


def test_a_quadratic_reward_is_tilted_to_by_the_right_one_and_missed_by_the_mean_and_the_clean_one() -> None:
    mean_reward, _, mean = tilted_moments(LINE, QUADRATIC, 1.0)
    assert (mean, mean_reward) == (pytest.approx(1.671, abs=1e-3), pytest.approx(-1.065, abs=1e-3))
    right = guided(NRG(), NoisedReward(exact(LINE, QUADRATIC)))
    assert float(right.mean()) == pytest.approx(1.673, abs=0.04)
    assert float(QUADRATIC(right[:, None]).mean()) == pytest.approx(-1.063, abs=0.1)
    by_mean = guided(NRG(), NoisedReward(expected(LINE, QUADRATIC)))
    assert float(by_mean.mean()) == pytest.approx(2.339, abs=0.04)
    assert float(QUADRATIC(by_mean[:, None]).mean()) == pytest.approx(-3.62, abs=0.15)
    by_clean = moments(guided(NRG(), NoisedReward(clean(QUADRATIC))))
    assert by_clean[1:] == (pytest.approx(1.885, abs=0.01), pytest.approx(0.0, abs=0.001))


def test_the_reward_of_the_clean_estimate_follows_itself_too_far() -> None:
    points = guided(DPS(through="denoiser"), PointsReward(QUADRATIC), budget=2.0, steps=200)
    assert float(points.mean()) == pytest.approx(1.132, abs=0.04)
    assert float(QUADRATIC(points[:, None]).mean()) == pytest.approx(-0.24, abs=0.06)


def test_averaging_over_what_the_sample_may_become_comes_closer_to_the_tilt() -> None:
    target = tilted_moments(LINE, QUADRATIC, 1.0)[0]
    once = guided(DPS(), PointsReward(QUADRATIC))
    often = guided(DPS(averages=4), PointsReward(QUADRATIC))
    missed = [abs(float(QUADRATIC(points[:, None]).mean()) - target) for points in (often, once)]
    assert missed[0] < 0.85 * missed[1]


def test_twice_the_weight_is_twice_the_tilt_where_the_noised_reward_is_of_that_weight() -> None:
    _, _, mean = tilted_moments(LINE, LINEAR, 2.0)
    found = moments(guided(NRG(), {NoisedReward(exact(LINE, LINEAR, 2.0)): 1.0}))
    assert found[1] == pytest.approx(mean, abs=0.06)


def test_the_claims_measure_the_points_that_the_method_draws_with_the_density_they_have() -> None:
    reward, start = exact(FOUR, Linear((1 / 1.3, 0.3 / 1.3))), torch.randn(200, 2, generator=torch.Generator())
    points, log_p = drawn(reward, 1.0, start, steps=40)
    policy = MixturePolicy(FOUR)
    cond = policy.condition(["p"] * 200, 40)
    steer = noisy_reward_steering(reward_of(reward), cond, policy.path, 40, NRG().strength)
    rolled = policy.rollout(cond, deterministic(40), torch.Generator(), latents=start, steer=steer)
    assert_close(points, rolled.x0, atol=1e-3, rtol=1e-3)
    best, kl = tilted(FOUR, linear, 1.0)
    assert float(linear(points).mean()) == pytest.approx(best, abs=0.15)
    assert float((log_p - FOUR.log_prob(points)).mean()) == pytest.approx(kl, abs=0.15)


def reward_of(noised: Callable[[Tensor, Tensor, Any], Tensor]) -> Callable[[Tensor, float, Any], Tensor]:
    """Asked with one noise level for all points."""
    return lambda x, sigma, cond: noised(x, torch.full((len(x),), sigma), cond)
