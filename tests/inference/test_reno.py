"""Noise optimisation: the published formulas, gradients through the whole sampler, and rewards that rise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from alignkit.errors import AlignkitError, RecipeError
from alignkit.flow.plan import deterministic
from alignkit.inference.guide import method_of, run
from alignkit.inference.judges import Judges
from alignkit.inference.reno import (
    ReNO,
    back_to_noise,
    nesterov_step,
    norm_regulariser,
    require_steppable,
    trajectory,
)
from alignkit.inference.steering import shortened
from alignkit.inference.task import Task, streams
from alignkit.policy import Policy
from recipes.mixture.world import Mixture, bimodal
from tests.inference.point_tasks import STEPS, Asked, decoded, exact_policy, generators, points, task_of
from tests.policy.zoo import PROMPTS, ZOO, shared


def smooth(x: Tensor) -> Tensor:
    """Rises to the right, everywhere."""
    return x[:, 0] / 2.0


def drawn(method: Any, reward: Any = None, prompts: int = 4, **task: Any) -> tuple[Any, Task]:
    own = task_of(reward or Asked(smooth), **task)
    method.check(own)
    return run(method, own, points(own, prompts), generators(prompts)), own


# formulas


def test_the_regulariser_is_the_published_one() -> None:
    z = torch.randn(3, 4, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    literal = []
    for one in z:
        norm = torch.linalg.vector_norm(one)
        literal.append(0.5 * norm**2 - (4 * 5 * 2 - 1) * torch.log(norm))
    assert_close(norm_regulariser(z, torch.ones_like(z, dtype=torch.bool)), torch.stack(literal))


def test_the_regulariser_is_least_on_the_sphere_of_gaussian_noise_and_is_minus_the_log_density_of_its_length() -> None:
    direction = torch.nn.functional.normalize(torch.ones(1, 65, dtype=torch.float64))
    z = (8.0 * direction).requires_grad_()
    (gradient,) = torch.autograd.grad(norm_regulariser(z, z > 0).sum(), z)
    assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)
    lengths = torch.tensor([6.0, 8.0, 9.0], dtype=torch.float64)
    squared = torch.distributions.Chi2(torch.tensor(65.0, dtype=torch.float64))
    density = squared.log_prob(lengths**2) + (2 * lengths).log()
    noises = lengths[:, None] * direction
    ours = norm_regulariser(noises, noises > 0)
    assert_close(ours - ours[0], density[0] - density)


def test_gradients_are_clipped_sample_by_sample_as_torch_does() -> None:
    gradient = torch.tensor([[3.0, 4.0], [0.03, 0.04], [0.0, 0.0]], dtype=torch.float64)
    assert_close(shortened(gradient, 0.1), torch.tensor([[0.06, 0.08], [0.03, 0.04], [0.0, 0.0]], dtype=torch.float64))
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    parameter.grad = gradient[0].clone()
    torch.nn.utils.clip_grad_norm_([parameter], 0.1)
    assert_close(shortened(gradient, 0.1)[0], parameter.grad, rtol=1e-6, atol=0)


def test_the_step_is_that_of_torchs_sgd_with_nesterov_momentum() -> None:
    rng = torch.Generator().manual_seed(0)
    z, buffer = torch.randn(2, 3, generator=rng, dtype=torch.float64), None
    theirs = torch.nn.Parameter(z.clone())
    optimiser = torch.optim.SGD([theirs], lr=5.0, momentum=0.9, nesterov=True)
    for _ in range(4):
        gradient = torch.randn(2, 3, generator=rng, dtype=torch.float64)
        theirs.grad = gradient.clone()
        optimiser.step()
        z, buffer = nesterov_step(z, buffer, gradient, 5.0, 0.9)
    assert_close(z, theirs.detach())


def test_the_regulariser_counts_what_is_free() -> None:
    z = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    free = torch.ones(2, 3, 4, dtype=torch.bool)
    free[:, 1:] = False
    own = z[:, :1]
    assert_close(norm_regulariser(z, free), norm_regulariser(own, torch.ones_like(own, dtype=torch.bool)))


# points


def test_one_iteration_is_the_plain_sample() -> None:
    out, task = drawn(ReNO(), budget=1.0)
    cond = points(task, 4)
    plain = exact_policy().rollout(cond, deterministic(STEPS), streams(generators(4), 1))
    assert_close(out.latents, plain.x0)
    assert task.spent.denoiser_gradients == 0


@pytest.mark.parametrize("budget", [1.0, 2.0, 5.5])
def test_what_is_spent_is_what_was_said_and_within_the_budget(budget: float) -> None:
    _, task = drawn(ReNO(), budget=budget)
    said = ReNO().calls(STEPS, budget) * 4
    assert vars(task.spent) == vars(said)
    assert said.denoiser <= 4 * budget * STEPS


def test_a_step_that_runs_again_for_its_gradient_changes_nothing_and_is_counted_once() -> None:
    with_it, one = drawn(ReNO(checkpoint=True), budget=6.0)
    without, other = drawn(ReNO(checkpoint=False), budget=6.0)
    assert_close(with_it.latents, without.latents)
    assert one.spent == other.spent


def test_the_optimisation_is_the_published_loop_written_out() -> None:
    out, task = drawn(ReNO(lr=2.0), budget=5.0, prompts=1)
    cond, policy = points(task, 1), exact_policy()
    z = torch.nn.Parameter(policy.initial_latents(cond, streams(generators(1), 1)))
    optimiser = torch.optim.SGD([z], lr=2.0, momentum=0.9, nesterov=True)
    rewards, samples = [], []
    for _ in range(5):
        x = z
        for k in range(STEPS):
            x = x + (cond.sigmas[k + 1] - cond.sigmas[k]) * policy.velocity(x, cond.sigmas[k])
        rewards.append(smooth(x).item())
        samples.append(x.detach())
        norm = torch.linalg.vector_norm(z)
        loss = -smooth(x).sum() + 0.01 * (0.5 * norm**2 - (2 - 1) * torch.log(norm))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([z], 0.1)
        optimiser.step()
    assert out.trace["reward"] == [[pytest.approx(one, abs=1e-5)] for one in rewards]
    assert_close(out.latents, samples[max(range(5), key=rewards.__getitem__)], atol=1e-5, rtol=1e-5)


def test_the_reward_rises_and_the_best_sample_is_returned() -> None:
    out, _ = drawn(ReNO(lr=1.0), prompts=32, budget=10.0, batch=32)
    first = torch.tensor(out.trace["reward"][0])
    assert float((out.rewards - first).mean()) > 0.3
    assert_close(out.rewards, torch.tensor(out.trace["reward"]).amax(0))
    assert_close(out.rewards, smooth(out.latents))


def test_the_gain_is_gone_when_the_gradient_points_nowhere() -> None:
    out, _ = drawn(ReNO(lr=1.0), Asked(lambda x: 0.0 * x.sum(1)), prompts=32, budget=10.0, batch=32)
    plain, _ = drawn(ReNO(), prompts=32, budget=1.0, batch=32)
    assert abs(float((smooth(out.latents) - plain.rewards).mean())) < 0.1


@pytest.mark.parametrize("batch", [1, 3])
def test_a_sample_depends_neither_on_the_batch_nor_on_other_prompts(batch: int) -> None:
    wanted, _ = drawn(ReNO(), prompts=4, budget=6.0)
    pieces, task = drawn(ReNO(), prompts=4, budget=6.0, batch=batch)
    assert_close(pieces.latents, wanted.latents)
    alone = run(ReNO(), task, points(task, 1), generators(1, first=2))
    assert_close(alone.latents, wanted.latents[2:3])


def test_no_more_samples_are_differentiated_at_once_than_the_batch_allows() -> None:
    reward = Asked(smooth)
    drawn(ReNO(), reward, prompts=5, budget=3.0, batch=2)
    assert max(reward.batches) == 2


def test_a_better_iterate_that_came_early_is_kept() -> None:
    out, _ = drawn(ReNO(lr=50.0), Asked(bimodal), prompts=16, budget=12.0)
    rewards = torch.tensor(out.trace["reward"])
    assert_close(out.rewards, rewards.amax(0))
    assert (rewards.argmax(0) < 11).any()


def test_the_noise_keeps_its_length_with_the_regulariser_and_leaves_without() -> None:
    def outwards(x: Tensor) -> Tensor:
        return 0.06 * x.norm(dim=1)

    policy, lengths = exact_policy(Mixture(means=((0.0,) * 64,))), {}
    for regularity in (0.01, 0.0):
        task = Task(policy, Judges(Asked(outwards)), 2, 60.0)
        out = run(ReNO(regularity=regularity), task, points(task, 4), generators(4))
        lengths[regularity] = torch.tensor(out.trace["noise_norm"][-1])
    assert ((lengths[0.01] - math.sqrt(64)).abs() < 2.0).all()
    assert (lengths[0.0] > 2 * math.sqrt(64)).all()


def test_positions_of_the_first_latents_that_are_given_stay_and_are_not_counted() -> None:
    task = task_of(Asked(lambda x: x.sum(1)), budget=4.0)
    initial, velocity, entered = task.policy.initial_latents, task.policy.velocity, []

    def given(cond: Any, rng: Any) -> Tensor:
        z = initial(cond, rng)
        z[:, 1] = 0.25
        return z

    def watched(x: Tensor, t: Any, cond: Any = None) -> Tensor:
        if float(t) == 1.0:
            entered.append(x.detach())
        return velocity(x, t, cond)

    task.policy.initial_latents, task.policy.velocity = given, watched
    out = run(ReNO(lr=2.0), task, points(task, 3), generators(3))
    assert all(torch.equal(x[:, 1], torch.full((3,), 0.25)) for x in entered)
    assert bool((entered[-1][:, 0] != entered[0][:, 0]).all())
    assert_close(torch.tensor(out.trace["noise_norm"][0]), entered[0][:, 0].abs())


@pytest.mark.parametrize("checkpoint", [True, False])
def test_one_sample_at_a_time_gives_the_same_samples(checkpoint: bool) -> None:
    reward = Asked(smooth)
    one, task = drawn(ReNO(gradient_batch=1, checkpoint=checkpoint), reward, budget=5.0)
    every, other = drawn(ReNO(checkpoint=checkpoint), budget=5.0)
    assert reward.batches[:16] == [1] * 16
    assert_close(one.latents, every.latents)
    assert task.spent == other.spent


def test_a_sample_without_a_reward_moves_on_by_its_length_and_loses() -> None:
    def right(x: Tensor) -> Any:
        return [smooth(own[None])[0] if float(own[0].detach()) > 0 else None for own in x]

    out, _ = drawn(ReNO(), Asked(right), budget=4.0, prompts=8)
    rewards = torch.tensor(out.trace["reward"])
    assert bool(rewards.isnan().any())
    best = torch.where(rewards.isnan(), -math.inf, rewards).amax(0)
    assert_close(out.rewards, torch.where(best == -math.inf, math.nan, best), equal_nan=True)


def test_weights_of_0_leave_nothing_to_follow() -> None:
    with pytest.raises(RecipeError, match="all rewards have weight 0, so 'reno'"):
        ReNO().check(task_of({Asked(smooth): 0.0}))


def test_many_steps_are_noted() -> None:
    few, _ = drawn(ReNO(), budget=1.0, num_steps=4)
    many, _ = drawn(ReNO(), budget=1.0, num_steps=5)
    assert "advice" not in few.trace and "5 steps" in many.trace["advice"][0]


def test_a_reward_without_gradient_is_refused_and_others_methods_are_offered() -> None:
    with pytest.raises(RecipeError, match=r"'reno' follows gradients and reader gives none.*best_of_n"):
        ReNO().check(task_of(Asked(name="reader", differentiable=False)))


def test_a_gradient_that_is_not_finite_stops_and_names_iteration_and_prompt() -> None:
    def rooted(x: Tensor) -> Tensor:
        return (x[:, 0] - x[:, 0].detach()).sqrt()

    with pytest.raises(AlignkitError, match=r"not finite at iteration 1, prompt 0 'p0'"):
        drawn(ReNO(), Asked(rooted))


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0.0}, {"clip": -1.0}, {"momentum": 1.0}, {"regularity": -0.1}, {"lr": math.nan}, {"gradient_batch": 0}],
    ids=str,
)
def test_impossible_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(wrong))}="):
        ReNO(**wrong)
    assert method_of("reno(lr=1.0)") == ReNO(lr=1.0)


# pipelines


def red(media: Tensor, prompts: Sequence[str]) -> Tensor:
    return media[:, 0].flatten(1).mean(1)


def pipeline_task(policy: Policy, reward: Any, budget: float, num_steps: int) -> Task:
    task = Task(policy, Judges(reward), num_steps, budget, batch=2)
    ReNO().check(task)
    return task


@pytest.mark.parametrize(("name", "num_steps"), [("sd3", 1), ("sd3", 3), ("sd15", 2)])
def test_the_steps_taken_with_gradients_are_the_pipelines_run(name: str, num_steps: int) -> None:
    with Policy(shared(name)) as policy:
        cond = policy.condition(list(PROMPTS), num_steps=num_steps, **{**ZOO[name].call, "guidance_scale": 4.0})
        task = pipeline_task(policy, "brightness", 1.0, num_steps)
        z = policy.initial_latents(cond, generators(2)).requires_grad_()
        x0 = trajectory(task, z, cond)[-1]
        plain = policy.rollout(cond, deterministic(num_steps), generators(2))
        assert_close(x0.detach(), plain.x0)
        (gradient,) = torch.autograd.grad(policy.decode(x0, cond).square().sum(), z)
        states = [x.detach() for x in trajectory(task, z.detach(), cond)]
        end = states[-1].requires_grad_()
        (last,) = torch.autograd.grad(policy.decode(end, cond).square().sum(), end)
        assert_close(back_to_noise(task, states, cond, last), gradient)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_few_step_pipeline_becomes_brighter_and_is_the_same_without_checkpointing(num_steps: int) -> None:
    outs, ran = [], []
    with Policy(shared("sd3")) as policy:
        cond = policy.condition(list(PROMPTS), num_steps=num_steps, **ZOO["sd3"].call, guidance_scale=4.0)
        for keep in (True, False):
            task = pipeline_task(policy, {"brightness": 100.0}, 6.0, num_steps)
            out, count = decoded(policy.pipe, partial(run, ReNO(checkpoint=keep), task, cond, generators(2)))
            outs.append(out)
            ran.append(count)
    assert_close(outs[0].latents, outs[1].latents)
    assert ran[0] == ran[1] + 5  # the iterations with a gradient compute the decoder's activations again
    assert not policy.pipe.vae.is_gradient_checkpointing
    rewards = torch.tensor(outs[0].trace["reward"])
    assert (rewards[-1] > rewards[0]).all()
    assert_close(outs[0].rewards, rewards.amax(0))


def test_a_pipeline_that_blends_known_parts_into_its_latents_is_refused() -> None:
    name = "sd15_inpaint_blend"
    with Policy(shared(name)) as policy:
        cond = policy.condition(list(PROMPTS), num_steps=3, **{**ZOO[name].call, "guidance_scale": 1.0})
        with pytest.raises(RecipeError, match="known parts"):
            require_steppable(cond)
