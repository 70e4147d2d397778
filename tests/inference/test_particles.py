"""Particle steering on a mixture where everything is known: it reproduces exact importance weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import alignkit
from alignkit.errors import AlignkitError, RecipeError
from alignkit.flow.path import RectifiedFlow, VariancePreserving
from alignkit.flow.plan import full
from alignkit.flow.transition import ODE, Noise
from alignkit.inference import cloud
from alignkit.inference.judges import Judges
from alignkit.inference.particles import DAS, FK, Particles
from alignkit.inference.task import Task, streams
from alignkit.types import Prompt
from recipes.mixture.policy import MixturePolicy
from recipes.mixture.world import FOUR, PointReward, bimodal, quadratic
from tests.inference.point_tasks import decoded
from tests.policy.zoo import PROMPTS, ZOO, shared

STEPS = 12


@dataclass(frozen=True, eq=False)
class Smooth:
    """A reward of points with gradients."""

    function: Callable[[Tensor], Tensor] = bimodal
    name: str = "smooth"
    kind = "latent"
    differentiable = True

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.function(media)


@dataclass(eq=False)
class OnlyRight:
    """A reward that answers None for points on the left, and counts how often it was asked."""

    asked: list[int] = field(default_factory=list)
    name: str = "only_right"
    kind = "latent"
    differentiable = False

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> list[float | None]:
        self.asked.append(len(media))
        return [float(x[1]) if float(x[0]) > 0 else None for x in media]


def task_of(reward: Any, count: float, steps: int = STEPS, batch: int = 100_000) -> Task:
    return Task(MixturePolicy(), Judges({reward: 1.0}), steps, count, batch)


def seeds(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def drawn(method: Particles, task: Task, prompts: int, first: int = 0):
    """(x0 (P, K, 2), rewards (P, K), normalised weights (P, K))."""
    method.check(task)
    cond = task.policy.condition(["a"] * prompts, task.num_steps)
    found, log_weights = method.particles(task, cond, seeds(prompts, first))
    shape = log_weights.shape
    return found.x0.unflatten(0, shape), found.scores.total.unflatten(0, shape), log_weights.softmax(1)


@cache
def exact(function: Callable[[Tensor], Tensor], noise: Noise, strength: float) -> tuple[float, Tensor]:
    """(E[r], shares of the modes (4,)) of the sampler's own distribution times exp(strength r), by importance weights
    of plain samples."""
    rng, sigmas = torch.Generator().manual_seed(99), torch.linspace(1.0, 0.0, STEPS + 1).tolist()
    x0 = torch.randn(60_000, 2, generator=rng)
    for k, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        kind = ODE if k == STEPS - 1 else noise
        step = kind.build(RectifiedFlow(), x0, FOUR.velocity(x0, sigma), sigma, sigma_next, sigmas[1])
        x0 = step.sample(torch.randn(x0.shape, generator=rng))
    reward = function(x0)
    weights = (strength * reward.double()).softmax(0)
    return float((weights * reward).sum()), shares(x0, weights)


def shares(x0: Tensor, weights: Tensor) -> Tensor:
    """(..., 4) weight in each mode, of points (..., K, 2)."""
    modes = FOUR.mode_of(x0.flatten(0, -2)).view(x0.shape[:-1])
    return torch.stack([(weights * (modes == mode)).sum(-1) for mode in range(4)], dim=-1)


def assert_tilted(method: Particles, function: Callable[[Tensor], Tensor], reward: Any) -> None:
    """Mean reward and shares of the modes agree with the exact ones within four standard errors over 8 runs."""
    x0, rewards, weights = drawn(method, task_of(reward, 400), prompts=8)
    mean, modes = exact(function, method.noise_of(MixturePolicy().path), method.strength)
    found = torch.cat([(weights * rewards).sum(1)[:, None], shares(x0, weights)], dim=1)
    error = found.std(0) / math.sqrt(len(found))
    expected = torch.cat([torch.tensor([mean]).double(), modes])
    off = (found.mean(0) - expected).abs() / (error + 0.002)
    assert bool((off < 4.0).all()), f"{found.mean(0)} +- {error}, exact {expected}"


# exactness


@pytest.mark.parametrize("potential", ["diff", "max", "add", "rt", "is"])
def test_every_potential_reproduces_the_tilted_distribution(potential: Any) -> None:
    method = FK(potential=potential, strength=2.0, ess=0.8, every=0.4, start=0.3, stop=0.7)
    assert_tilted(method, bimodal, PointReward(bimodal))


@pytest.mark.parametrize("resampling", ["multinomial", "ssp"])
def test_every_resampling_reproduces_the_tilted_distribution(resampling: Any) -> None:
    assert_tilted(FK(resampling=resampling, strength=2.0, ess=1.0), bimodal, PointReward(bimodal))


@pytest.mark.parametrize("through", ["x0", "denoiser"])
def test_das_reproduces_the_tilted_distribution(through: Any) -> None:
    assert_tilted(DAS(through=through, strength=3.0), bimodal, Smooth(bimodal))


def test_das_is_exact_for_a_reward_that_pulls_hard_and_with_clipped_shifts() -> None:
    assert_tilted(DAS(strength=3.0, clip=0.5), quadratic, Smooth(quadratic))


def test_das_without_the_correction_of_its_shifts_is_not_the_tilted_distribution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cloud.Proposal, "log_ratio", lambda self, latents: torch.zeros(len(latents)))
    with pytest.raises(AssertionError):
        assert_tilted(DAS(strength=3.0, through="denoiser", noise=1.0), bimodal, Smooth(bimodal))


def test_proposals_that_follow_the_gradient_leave_more_even_weights() -> None:
    """DAS against the same tempering without shifts."""
    task, blind = task_of(Smooth(quadratic), 400), task_of(Smooth(quadratic), 400)
    drawn(DAS(strength=3.0, through="denoiser", ess=0.0), task, 4)
    drawn(DAS(strength=3.0, through="denoiser", ess=0.0, clip=1e-6), blind, 4)
    assert sum(task.trace["ess"][-1]) > 1.2 * sum(blind.trace["ess"][-1])


# what a run is


def test_one_particle_is_the_plain_stochastic_run_bit_for_bit() -> None:
    task = task_of(PointReward(bimodal), 1)
    cond = task.policy.condition(["a", "b", "c"], STEPS)
    found = FK().draw(task, cond, seeds(3))
    plain = task.policy.rollout(cond, full(STEPS, Noise("flow_sde", 0.7)), streams(seeds(3), 1))
    assert torch.equal(found.x0, plain.x0)


def test_without_strength_nothing_is_resampled_and_weights_stay_equal() -> None:
    for method in (FK(strength=0.0, ess=1.0), DAS(strength=0.0, ess=1.0)):
        task = task_of(Smooth(), 5)
        _, _, weights = drawn(method, task, 3)
        assert_close(weights, torch.full_like(weights, 0.2))
        assert not any(any(rows) for rows in task.trace["resampled"])


@pytest.mark.parametrize("method", [FK(ess=1.0, pick="sample"), DAS(ess=1.0, pick="sample")])
def test_a_prompt_does_not_depend_on_the_others(method: Particles) -> None:
    task = task_of(Smooth(), 4)
    cond = task.policy.condition(["a", "b", "c"], STEPS)
    together = method.draw(task, cond, seeds(3))
    alone = method.draw(task_of(Smooth(), 4), cond[[1]], seeds(1, first=1))
    assert_close(together.x0[1:2], alone.x0, rtol=1e-5, atol=1e-6)


def test_scoring_in_pieces_changes_nothing() -> None:
    whole, pieces = (drawn(FK(), task_of(Smooth(), 6, batch=size), 2)[0] for size in (100, 5))
    assert torch.equal(whole, pieces)


def test_gradients_of_one_sample_at_a_time_change_nothing() -> None:
    whole, single = (drawn(DAS(gradient_batch=size), task_of(Smooth(), 4), 2)[0] for size in (None, 1))
    assert_close(whole, single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("through", ["x0", "denoiser"])
def test_das_that_computes_activations_again_draws_the_same(through: Any) -> None:
    pipe, outs, ran = shared("sd3"), [], []
    for again in (False, True):
        method = DAS(strength=100.0, through=through, checkpointing=again)
        options: dict[str, Any] = {"num_steps": 4, "progress": False, **ZOO["sd3"].call}
        draw = partial(alignkit.guide, pipe, PROMPTS, "brightness", method, 4.0, **options)
        out, count = decoded(pipe, draw)
        outs.append(out.latents)
        ran.append(count)
    assert_close(outs[0], outs[1])
    assert ran[1] == ran[0] + 2  # the two steps whose mean is shifted
    assert not pipe.vae.is_gradient_checkpointing and not pipe.transformer.is_gradient_checkpointing


def test_das_refuses_to_compute_again_what_cannot() -> None:
    with pytest.raises(RecipeError, match="gradient_batch=1"):
        drawn(DAS(checkpointing=True), task_of(Smooth(), 4), 1)


def test_copies_stay_within_their_prompt() -> None:
    """A reward that only one prompt can have would draw all particles to it if rows were exchanged across prompts."""
    task = task_of(Smooth(), 3, steps=4)
    cond = task.policy.condition(["a", "b"], 4)
    seen: list[Tensor] = []
    original = cloud.taken

    def watched(step: Any, rows: Tensor) -> Any:
        seen.append(rows)
        return original(step, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cloud, "taken", watched)
        FK(strength=100.0, ess=1.0).particles(task, cond, seeds(2))
    assert seen
    assert all(rows[:3].max() < 3 <= rows[3:].min() for rows in seen)


# rewards


def test_black_box_rewards_that_do_not_apply_everywhere_work() -> None:
    reward = OnlyRight()
    task = task_of(reward, 8)
    _, rewards, weights = drawn(FK(), task, 5)
    assert bool((weights[rewards.isnan()] == 0).all())
    best = FK().draw(task_of(OnlyRight(), 8), task.policy.condition(["a"] * 5, STEPS), seeds(5))
    assert bool((best.x0[:, 0] > 0).all())
    assert reward.asked


def test_the_best_is_chosen_by_reward_and_a_sample_by_weight_and_nan_only_where_nothing_else_is() -> None:
    total = torch.tensor([1.0, math.nan, 3.0, math.nan, math.nan, math.nan])
    log_weights = torch.tensor([[0.0, -math.inf, -math.inf], [-math.inf, 0.0, -math.inf]], dtype=torch.float64)
    assert cloud.chosen("best", total, log_weights, seeds(2)) == [2, 3]
    assert cloud.chosen("sample", total, log_weights, seeds(2)) == [0, 4]


def test_a_prompt_none_of_whose_particles_has_a_reward_is_counted_and_still_drawn() -> None:
    task = task_of(OnlyRight(), 1)
    x0, _, weights = drawn(FK(), task, 6)
    assert sum(task.trace["unscored"]) > 0
    assert bool(weights.isfinite().all() and x0.isfinite().all())


def test_das_refuses_a_reward_without_gradient_and_offers_fk() -> None:
    with pytest.raises(RecipeError, match="fk"):
        DAS().check(task_of(PointReward(bimodal), 4))


def test_das_stops_at_a_gradient_that_is_not_finite() -> None:
    broken = Smooth(lambda x: (x[:, 0] * 0.0).abs().sqrt() + 1.0)
    with pytest.raises(AlignkitError, match="step 1"):
        drawn(DAS(), task_of(broken, 2), 1)


# options, costs, trace


def test_the_trace_has_the_effective_size_and_the_resampled_prompts_of_every_moment() -> None:
    task = task_of(PointReward(bimodal), 4)
    drawn(FK(every=0.25, start=0.25, stop=0.75, ess=0.9), task, 3)
    assert task.trace["moment"] == [3, 6, 9]
    assert [len(sizes) for sizes in task.trace["ess"]] == [3, 3, 3]
    assert all(1.0 <= size <= 4.0 + 1e-9 for sizes in task.trace["ess"] for size in sizes)
    sizes, rows = task.trace["ess"], task.trace["resampled"]
    assert rows == [[size < 0.9 * 4 for size in own] for own in sizes]
    assert any(any(own) for own in rows)


@pytest.mark.parametrize(
    "method", [FK(), FK(potential="is"), FK(every=0.1), DAS(), DAS(through="denoiser"), DAS(gradient_batch=1)]
)
def test_a_method_costs_what_it_says(method: Particles) -> None:
    task = task_of(Smooth(), 4)
    drawn(method, task, 2)
    said = method.calls(STEPS, 4) * 2
    assert vars(task.spent) == vars(said)
    assert task.spent.denoiser <= 4 * STEPS * 2


def test_moments_are_steps_with_noise_once_each() -> None:
    assert FK().moments(28) == [6, 11, 17, 22]
    assert FK(every=0.01, start=0.0, stop=1.0).moments(5) == [0, 1, 2, 3]
    assert FK().moments(2) == [0]
    assert FK(potential="bon").moments(28) == []


def test_variance_preserving_models_get_ddim_noise() -> None:
    assert FK().noise_of(VariancePreserving()) == Noise("ddim", 1.0)
    assert FK(noise=0.5).noise_of(VariancePreserving()) == Noise("ddim", 0.5)
    assert FK(noise=Noise("cps", 0.8)).noise_of(MixturePolicy().path) == Noise("cps", 0.8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"potential": "sum"}, "diff, max"),
        ({"strength": -1.0}, "negative weight"),
        ({"resampling": "residual"}, "systematic"),
        ({"ess": 2.0}, "share of the particles"),
        ({"start": 0.9, "stop": 0.1}, "shares of the steps"),
        ({"pick": "worst"}, "best, sample"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        FK(**options)


def test_runs_that_cannot_work_are_refused() -> None:
    with pytest.raises(RecipeError, match="copies alike"):
        FK(noise=0.0).check(task_of(Smooth(), 4))
    with pytest.raises(RecipeError, match="at least 2 steps"):
        FK().check(task_of(Smooth(), 4, steps=1))
    with pytest.raises(RecipeError, match="budget=2"):
        DAS(through="denoiser").check(task_of(Smooth(), 1))
    with pytest.raises(RecipeError, match="all rewards have weight 0, so 'fk'"):
        FK().check(Task(MixturePolicy(), Judges({Smooth(): 0.0}), 4, 4))
