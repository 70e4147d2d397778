"""Guidance by gradients: the formulas, what it costs, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import alignkit
from alignkit.errors import AlignkitError, RecipeError
from alignkit.flow.guidance import Strength
from alignkit.flow.path import Path, RectifiedFlow, VariancePreserving, eps_from_velocity, x0_from_velocity
from alignkit.inference.gradients import DPS, NRG, GradientGuidance
from alignkit.inference.guide import run
from alignkit.inference.judges import Judges
from alignkit.inference.method import BestOfN
from alignkit.inference.steering import (
    climbed,
    noisy_reward_steering,
    pulled_back,
    reward_gradient,
    smoothed_gradient,
)
from alignkit.inference.task import Task
from alignkit.types import Prompt, Step
from recipes.mixture.noised import Linear, NoisedReward, exact
from recipes.mixture.policy import MixturePolicy
from recipes.mixture.world import FOUR, bimodal, quadratic
from tests.policy.zoo import PROMPTS, ZOO, shared

STEPS = 8


class PointsReward:
    """A reward of clean points."""

    kind = "latent"

    def __init__(self, function: Callable[[Tensor], Tensor], name: str = "points", differentiable: bool = True) -> None:
        self.function, self.name, self.differentiable = function, name, differentiable

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.function(media)


TILT = NoisedReward(exact(FOUR, Linear((1.0, 0.0))))
SMOOTH = PointsReward(quadratic)


def task_of(reward: Any = SMOOTH, budget: float = 1.0, batch: int = 16, steps: int = STEPS) -> Task:
    return Task(MixturePolicy(FOUR), Judges(reward), steps, budget, batch)


def drawn(method: Any, task: Task, count: int = 3, first: int = 0) -> Any:
    cond = task.policy.condition([f"p{first + i}" for i in range(count)], task.num_steps)
    return run(method, task, cond, [torch.Generator().manual_seed(first + i) for i in range(count)])


def step_at(sigma: float, path: Path, index: int = 3, count: int = 3) -> Step:
    """A step in float64 that nobody takes."""
    rng = torch.Generator().manual_seed(0)
    x, v = (torch.randn(count, 2, generator=rng, dtype=torch.float64) for _ in range(2))

    def untaken(latents: Tensor, velocity: Tensor) -> Any:
        raise AssertionError("this step is not taken")

    return Step(index, sigma, sigma, sigma - 0.1, x, v, False, untaken)


def points(count: int = 3) -> Any:
    return MixturePolicy(FOUR).condition([f"p{i}" for i in range(count)], STEPS)


def swirl(x: Tensor) -> Tensor:
    """(B, 2) -> (B,), with a gradient that depends on everything."""
    return (x[:, 0] * x[:, 1] + x[:, 0].sin()) + x[:, 1] ** 3 / 10


def test_noisy_reward_guidance_is_the_published_formula() -> None:
    step, weight = step_at(0.7, RectifiedFlow()), 1.5
    x = step.latents.clone().requires_grad_()
    (g,) = torch.autograd.grad((swirl(x) * 0.7).sum(), x)
    literal = step.velocity - weight * 0.7 / (1 - 0.7) * g
    steer = noisy_reward_steering(
        lambda x, sigma, cond: swirl(x) * sigma, points(), RectifiedFlow(), STEPS, Strength(weight)
    )
    guided = steer(step)
    assert_close(guided.velocity, literal)
    assert guided.velocity.dtype == torch.float64 and guided.latents is step.latents


def test_an_epsilon_model_is_guided_by_minus_sigma_times_the_gradient() -> None:
    step, path = step_at(0.7, VariancePreserving()), VariancePreserving()
    (g,) = torch.autograd.grad(swirl(x := step.latents.clone().requires_grad_()).sum(), x)
    guided = noisy_reward_steering(lambda x, sigma, cond: swirl(x), points(), path, STEPS, Strength(1.5))(step)
    before, after = (eps_from_velocity(path, one.velocity, step.latents, 0.7) for one in (step, guided))
    assert_close(after, before - 1.5 * 0.7 * g)


def test_a_singular_step_and_steps_outside_the_window_are_not_asked_about() -> None:
    def never(x: Tensor, sigma: float, cond: Any) -> Tensor:
        raise AssertionError("asked")

    steer = noisy_reward_steering(never, points(), RectifiedFlow(), STEPS, Strength(start=0.5))
    for step in (step_at(1.0, RectifiedFlow(), 0), step_at(0.9995, RectifiedFlow(), 4), step_at(0.7, RectifiedFlow())):
        assert steer(step) is step


def test_guidance_by_the_right_reward_is_finite_next_to_noise() -> None:
    rate_limit = noisy_reward_steering(
        lambda x, sigma, cond: TILT(x, torch.full((len(x),), sigma, dtype=x.dtype), cond),
        points(),
        RectifiedFlow(),
        STEPS,
        Strength(sigma_singular=1.0),
    )
    changes = []
    for sigma in (0.99, 0.999, 0.99999):
        step = step_at(sigma, RectifiedFlow())
        changes.append(rate_limit(step).velocity - step.velocity)
    assert all(bool(change.isfinite().all()) for change in changes)
    assert_close(changes[1], changes[2], rtol=0.01, atol=0.01)


def test_without_weight_the_samples_are_the_unguided_ones_bit_for_bit() -> None:
    plain = drawn(BestOfN(), task_of(TILT)).latents
    assert torch.equal(drawn(NRG(weight=0.0), task_of(TILT)).latents, plain)
    assert torch.equal(drawn(NRG(start=0.99), task_of(TILT)).latents, plain)
    assert torch.equal(drawn(DPS(weight=0.0), task_of()).latents, plain)
    assert not torch.equal(drawn(NRG(), task_of(TILT)).latents, plain)


def test_a_sample_does_not_depend_on_the_others_nor_on_the_batch() -> None:
    method = DPS(averages=2, repeats=2)
    together = drawn(method, task_of(budget=3.0)).latents
    alone = torch.cat([drawn(method, task_of(budget=3.0, batch=1), 1, first=i).latents for i in range(3)])
    assert_close(together, alone)


def test_a_larger_budget_keeps_the_best_of_more_guided_samples() -> None:
    rewards = [drawn(NRG(), task_of(TILT, budget)).rewards for budget in (1.0, 4.0)]
    assert bool((rewards[1] >= rewards[0]).all()) and bool((rewards[1] > rewards[0]).any())


def test_the_weights_of_a_call_weigh_the_gradients() -> None:
    up, right = (NoisedReward(exact(FOUR, Linear(d)), name=n) for d, n in (((0.0, 1.0), "up"), ((1.0, 0.0), "right")))
    plain = drawn(BestOfN(), task_of(TILT), 64).latents.mean(0)
    for weights, axis in (((1.0, 0.0), 1), ((0.0, 1.0), 0)):
        guided = drawn(NRG(), task_of(dict(zip((up, right), weights, strict=True))), 64).latents.mean(0)
        assert float(guided[axis] - plain[axis]) > 0.5
        assert abs(float(guided[1 - axis] - plain[1 - axis])) < 0.1


# the predicted clean sample


def test_dps_through_the_denoiser_is_autograd_of_the_composed_function() -> None:
    task, method = task_of(PointsReward(bimodal)), DPS(through="denoiser", weight=1.5)
    cond = points()
    step = replace(step_at(0.7, RectifiedFlow()), latents=torch.randn(3, 2, generator=torch.Generator()))
    velocity = task.policy.velocity(step.latents, 0.7, cond).detach()
    guided = method.steered(task, cond, replace(step, velocity=velocity), 1.5)
    x = step.latents.clone().requires_grad_()
    x0 = x - 0.7 * task.policy.velocity(x, 0.7, cond)
    (g,) = torch.autograd.grad(bimodal(x0).sum(), x)
    assert_close(guided.velocity, velocity - 1.5 * 0.7 / (1 - 0.7) * g)


@pytest.mark.parametrize("path", [RectifiedFlow(), VariancePreserving()])
def test_dps_through_x0_takes_the_slope_of_data_of_unit_variance(path: Path) -> None:
    task, sigma = task_of(PointsReward(swirl)), 0.6
    task.policy.path = path
    step = step_at(sigma, path)
    x0 = x0_from_velocity(path, step.velocity, step.latents, sigma).requires_grad_()
    (g,) = torch.autograd.grad(swirl(x0).sum(), x0)
    alpha = float(path.alpha(sigma))
    for method, slope in ((DPS(), alpha / (alpha**2 + sigma**2)), (DPS(jacobian="identity"), 1.0)):
        guided = method.steered(task, points(), step, 1.0)
        moved = x0_from_velocity(path, guided.velocity, step.latents, sigma)
        assert_close(moved, x0.detach() + sigma**2 / alpha * slope * g, rtol=1e-5, atol=1e-6)


def test_averaging_is_the_logarithm_of_the_mean_exponential_over_draws() -> None:
    rng = torch.Generator().manual_seed(0)
    x0, *offsets = (torch.randn(3, 2, generator=rng, dtype=torch.float64) for _ in range(4))
    x = x0.clone().requires_grad_()
    literal = torch.stack([(2.5 * swirl(x + offset)).exp() for offset in offsets]).mean(0)
    (g,) = torch.autograd.grad(literal.log().sum() / 2.5, x)
    value, gradient = smoothed_gradient(lambda x, cond: swirl(x), x0, points(), offsets, 2.5, batch=2)
    assert_close(gradient, g)
    assert_close(value, literal.detach().log() / 2.5)


def test_draws_around_the_clean_estimate_spread_as_far_as_it_is_unsure() -> None:
    step = replace(step_at(0.6, RectifiedFlow()), latents=torch.zeros(1, 50_000))
    offsets = torch.cat(DPS(averages=2).offsets(RectifiedFlow(), step))
    assert float(offsets.std()) == pytest.approx(0.6 / math.sqrt(0.4**2 + 0.6**2), rel=0.02)
    assert not torch.equal(offsets[0], offsets[1])


def test_with_normalise_the_weight_is_no_exponent_of_the_average() -> None:
    task, step = task_of(PointsReward(swirl)), step_at(0.6, RectifiedFlow())
    method = DPS(normalise=True, averages=3, weight=0.01)
    changes = [replace(method, weight=w).steered(task, points(), step, w).velocity - step.velocity for w in (0.01, 2.0)]
    assert_close(changes[0] * 200.0, changes[1])
    x0 = x0_from_velocity(RectifiedFlow(), step.velocity, step.latents, 0.6)
    offsets = method.offsets(RectifiedFlow(), step)
    _, gradient = smoothed_gradient(lambda x, cond: swirl(x), x0, points(), offsets, 1.0)
    assert_close(torch.cosine_similarity(changes[1], -gradient), torch.ones(3, dtype=torch.float64))


def test_a_gradient_is_carried_back_through_the_clean_estimate() -> None:
    x, gradient = (torch.randn(3, 2, generator=torch.Generator().manual_seed(i)) for i in range(2))
    own = x.clone().requires_grad_()
    (literal,) = torch.autograd.grad((own.sin() * own.roll(1, -1) * gradient).sum(), own)
    assert_close(pulled_back(lambda x, cond: x.sin() * x.roll(1, -1), x, points(), gradient, batch=2), literal)


def test_backward_guidance_climbs_the_reward_from_the_clean_estimate() -> None:
    x0 = torch.randn(3, 2, generator=torch.Generator(), dtype=torch.float64)
    delta = climbed(lambda x, cond: -x.square().sum(1) / 2, x0, points(), steps=3, lr=0.1)
    assert_close(delta, x0 * (0.9**3 - 1))
    step, task = step_at(0.6, RectifiedFlow()), task_of(PointsReward(lambda x: -x.square().sum(1) / 2))
    x0 = x0_from_velocity(RectifiedFlow(), step.velocity, step.latents, 0.6)
    guided = DPS(weight=0.0, backward_steps=3).steered(task, points(), step, 0.0)
    moved = x0_from_velocity(RectifiedFlow(), guided.velocity, step.latents, 0.6)
    assert_close(moved, x0 * 0.9**3, rtol=1e-5, atol=1e-6)


def test_time_travel_repeats_the_steps_between_its_shares() -> None:
    task = task_of(steps=10, budget=2.0)
    drawn(DPS(repeats=3, repeat_start=0.2, repeat_stop=0.5), task, 1)
    ran = [step["step"] for step in task.trace["guidance"]]
    assert ran == [1, *[2] * 3, *[3] * 3, *[4] * 3, 5, 6, 7, 8, 9]


# costs


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        (NRG(), 1.0),
        (NRG(start=0.3, stop=0.8, schedule="rising"), 3.0),
        (DPS(), 2.0),
        (DPS(through="denoiser"), 2.0),
        (DPS(through="denoiser", start=0.5), 4.0),
        (DPS(averages=3, backward_steps=2), 1.0),
        (DPS(weight=0.0, backward_steps=2), 1.0),
        (DPS(through="denoiser", weight=0.0, backward_steps=1), 1.0),
        (DPS(repeats=3, through="denoiser"), 7.5),
    ],
    ids=str,
)
def test_the_cost_that_is_said_beforehand_is_what_is_spent(method: GradientGuidance, budget: float) -> None:
    task = task_of(TILT if isinstance(method, NRG) else SMOOTH, budget, batch=2)
    method.check(task)
    drawn(method, task)
    assert asdict(task.spent) == asdict(method.calls(STEPS, budget) * 3)
    assert task.spent.denoiser <= budget * STEPS * 3


@pytest.mark.parametrize("method", [NRG(), DPS(averages=2, backward_steps=1), DPS(through="denoiser")], ids=str)
def test_one_sample_at_a_time_gives_the_same_samples(method: GradientGuidance) -> None:
    reward = TILT if isinstance(method, NRG) else SMOOTH
    one, all_at_once = (drawn(replace(method, gradient_batch=n), task_of(reward, 2.0)).latents for n in (1, None))
    assert_close(one, all_at_once)


# what is refused


def test_a_reward_that_has_not_seen_noise_is_refused_with_what_would_work() -> None:
    blind = PointsReward(quadratic, "blind", differentiable=False)
    with pytest.raises(RecipeError, match=r"blind knows only finished samples.*'fk' or 'best_of_n'") as found:
        NRG().check(task_of({TILT: 1.0, blind: 0.5}))
    assert "dps" not in str(found.value)
    with pytest.raises(RecipeError, match=r"method='dps'.*or 'fk'"):
        NRG().check(task_of(SMOOTH))
    clean = NoisedReward(TILT.function, noise_aware=False)
    with pytest.raises(RecipeError, match="noised knows only finished samples"):
        NRG().check(task_of(clean))
    NRG().check(task_of({TILT: 1.0, blind: 0.0}))


def test_a_reward_without_gradients_is_refused_with_what_would_work() -> None:
    with pytest.raises(RecipeError, match=r"blind gives none; use method='fk'"):
        DPS().check(task_of(PointsReward(quadratic, "blind", differentiable=False)))


def test_a_budget_that_pays_no_sample_is_refused_with_one_that_does() -> None:
    with pytest.raises(RecipeError, match=r"costs 1\.88 plain ones.*give budget=2"):
        DPS(through="denoiser").check(task_of())
    DPS(through="denoiser").check(task_of(budget=2.0))


def test_a_grid_that_begins_below_noise_has_one_guided_step_more_to_pay() -> None:
    method, low = DPS(through="denoiser"), torch.linspace(0.99, 0.0, 5)
    method.check(task_of(budget=1.75, steps=4))
    with pytest.raises(RecipeError, match=r"costs 2\.00 plain ones.*give budget=2"):
        method.check(replace(task_of(budget=1.75, steps=4), sigmas=low))
    task = task_of(budget=1.75, steps=4)
    cond = replace(task.policy.condition(["p"], 4), sigmas=low)
    with pytest.raises(RecipeError, match=r"budget=1\.75 does not pay"):
        method.draw(task, cond, [torch.Generator()])
    assert task.spent.denoiser == 0


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_budget_is_held_on_grids_that_begin_below_noise(name: str) -> None:
    method = DPS(through="denoiser", weight=0.01)
    options: dict[str, Any] = {"num_steps": 4, **ZOO[name].call}
    with pytest.raises(RecipeError, match="does not pay"):
        alignkit.guide(shared(name), PROMPTS, "brightness", method, 1.75, **options)
    out = alignkit.guide(shared(name), PROMPTS, "brightness", method, 2.0, **options)
    assert out.trace["budget_used"] == 2.0


@pytest.mark.parametrize("method", [NRG(), DPS()], ids=str)
def test_weights_of_0_leave_nothing_to_follow(method: GradientGuidance) -> None:
    with pytest.raises(RecipeError, match=f"all rewards have weight 0, so '{method.name}'"):
        method.check(task_of({TILT: 0.0}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"through": "latents"},
        {"jacobian": "exact"},
        {"averages": 0},
        {"backward_steps": -1},
        {"repeats": 0},
        {"repeat_start": 0.6},
        {"gradient_batch": 0},
        {"start": 1.0},
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        DPS(**wrong)


def test_a_gradient_that_is_not_finite_stops_and_names_step_and_prompt() -> None:
    def broken(latents: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        value = latents[:, 0].clone()
        value[1] = value[1] + (latents[1, 0] - latents[1, 0].detach()).abs().sqrt()  # 0, with an infinite slope
        return value

    with pytest.raises(AlignkitError, match=r"not finite at step 1 \(sigma 0\.8750\), prompt 1 'p1'"):
        drawn(NRG(), task_of(NoisedReward(broken)))


def test_a_reward_that_leaves_torch_is_refused() -> None:
    with pytest.raises(AlignkitError, match="gives no gradient"):
        reward_gradient(lambda x, cond: x.detach().sum(1), torch.zeros(3, 2), points())
