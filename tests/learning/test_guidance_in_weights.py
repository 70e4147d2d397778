"""Guidance taught to the weights on points of a mixture, where the right answer has a closed form.

`ValueGradient` with the exact value function, `log E[exp(r(x0)) | x_sigma]`, must sample the tilt `p exp(r)` without a
guide: reward, shares of the modes and mean are compared with sums over a grid. Its control is the guide turned round.
`Euphonium` is compared with Flow-GRPO after the same few rounds, on a reward that it also has as its guide, before
either is near the top.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.testing import assert_close

from alignkit.flow.plan import deterministic
from alignkit.training.euphonium import Euphonium
from alignkit.training.grpo import GRPO
from alignkit.training.value_gradient import ValueGradient
from recipes.mixture.measure import measure
from recipes.mixture.noised import Linear, Noised, NoisedReward, Quadratic, exact
from recipes.mixture.policy import MixturePolicy
from recipes.mixture.train import UNUSED, train
from recipes.mixture.world import FOUR, PointReward, linear, quadratic

SLOPE = 0.5
VALUE = exact(FOUR, Linear((SLOPE / 1.3, 0.3 * SLOPE / 1.3)))  # of SLOPE times `linear`
POINTS = 1024


def grid() -> tuple[torch.Tensor, torch.Tensor]:
    """Points (N, 2) of the plane, and the probability of each under the tilted mixture (N,)."""
    axis = torch.linspace(-5.0, 5.0, 150, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    return points, (FOUR.log_prob(points) + SLOPE * linear(points)).softmax(0)


def sampled(guide: Noised, rounds: int = 200, **fields: Any) -> torch.Tensor:
    """(POINTS, 2) of a policy after velocity-gradient matching, drawn without a guide."""
    shape = {"steps": rounds, "prompts_per_step": 8, "group_size": 16, "lr": 1e-2, "lr_schedule": "linear"}
    own = {"rewards": {PointReward(linear): 1.0}, "guide": {NoisedReward(guide): 1.0}}
    policy = MixturePolicy()
    train(ValueGradient(**{**UNUSED, **shape, **own, **fields}), policy)
    return drawn(policy)


def drawn(policy: MixturePolicy) -> torch.Tensor:
    cond = policy.condition(["a point"] * POINTS, 20)
    return policy.rollout(cond, deterministic(20), torch.Generator().manual_seed(0)).x0


def test_the_value_function_in_the_weights_samples_the_tilted_mixture() -> None:
    points, chance = grid()
    found, base = sampled(VALUE), drawn(MixturePolicy())
    reward = float(linear(found).mean())
    wanted, before = float((chance * linear(points)).sum()), float(linear(base).mean())
    assert abs(reward - wanted) < 0.15 * (wanted - before)
    shares = torch.stack([chance[FOUR.mode_of(points) == mode].sum() for mode in range(4)]).float()
    assert_close(FOUR.shares_of(found), shares, rtol=0, atol=0.05)
    assert float((FOUR.shares_of(base) - shares).abs().max()) > 0.2  # the tilt is far enough to be seen
    assert_close(found.mean(0), (chance[:, None] * points).sum(0).float(), rtol=0, atol=0.2)


def test_a_guide_turned_round_goes_the_other_way() -> None:
    found = sampled(lambda x, sigma, cond: VALUE(-x, sigma, cond), rounds=60)
    assert float(linear(found).mean()) < -0.5


def gain(method: type[GRPO], **fields: Any) -> float:
    """How far `quadratic` rises in a few rounds; the base has -4 and the right mode alone 0."""
    shape = {"steps": 8, "prompts_per_step": 8, "group_size": 16, "lr": 3e-3, "clip": 0.1, "updates": 2}
    policy = MixturePolicy()
    train(method(**{**UNUSED, **shape, "rewards": {PointReward(quadratic): 1.0}, **fields}), policy)
    return measure(policy, quadratic, 128).gain


def test_distilled_guidance_learns_faster_than_the_policy_gradient_alone() -> None:
    guide = {NoisedReward(exact(FOUR, Quadratic((1.5, 2.0), 0.25))): 1.0}
    plain = gain(GRPO)
    assert gain(Euphonium, guide=guide, guide_weight=0.0) == plain
    assert gain(Euphonium, guide=guide, distil_beta=0.1) > plain + 0.2


def test_with_a_guide_turned_round_it_does_not() -> None:
    value = exact(FOUR, Quadratic((1.5, 2.0), 0.25))
    guide = {NoisedReward(lambda x, sigma, cond: -value(x, sigma, cond)): 1.0}
    assert gain(Euphonium, guide=guide, distil_beta=0.1) < gain(GRPO) - 0.2
