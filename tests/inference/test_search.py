"""Search over noises, paths and drafts: what it does, within which budget, and that it finds more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from alignkit.errors import RecipeError
from alignkit.flow.plan import deterministic
from alignkit.inference.guide import method_of, run
from alignkit.inference.judges import Judges
from alignkit.inference.method import BestOfN
from alignkit.inference.runs import Group, by_slot, judged, rendered
from alignkit.inference.search import (
    Search,
    Stretch,
    allowance,
    branched,
    neighbour,
    over_drafts,
    require_pure_noise,
    stretches,
    stretches_from,
    top,
    with_steps,
)
from alignkit.inference.task import Task, comparable, streams
from alignkit.policy import Policy
from recipes.mixture.world import bimodal
from tests.inference.point_tasks import STEPS, Asked, exact_policy, generators, points, recorded_batches, task_of
from tests.policy.zoo import PROMPTS, ZOO, shared

ALL = [
    Search(),
    Search(starts=1, neighbours=3),
    Search(over="paths"),
    Search(over="paths", checks=(0.25, 0.5, 0.75), branches=3, back=0.3),
    Search(over="paths", branches=1),
    Search(over="drafts"),
    Search(over="drafts", winners=2),
]
CALL = {"height": 32, "width": 32, "guidance_scale": 4.0, "max_sequence_length": 8}


def contrast(media: Tensor, prompts: Sequence[str]) -> Tensor:
    """Standard deviation of the pixels; gives no gradient."""
    return media.flatten(1).std(1)


def drawn(search: Any, reward: Any = None, prompts: int = 3, **task: Any) -> tuple[Any, Task]:
    own = task_of(reward or Asked(differentiable=False), **task)
    search.check(own)
    return run(search, own, points(own, prompts), generators(prompts)), own


def shown(search: Search) -> str:
    return f"{search.over}-{search.branches}-{search.winners}-{search.starts}"


# every search


@pytest.mark.parametrize("search", ALL, ids=shown)
@pytest.mark.parametrize("budget", [3.0, 4.7, 9.0])
def test_a_search_spends_what_it_says_and_no_more_than_its_budget(search: Search, budget: float) -> None:
    out, task = drawn(search, budget=budget)
    said = search.calls(STEPS, budget)
    assert task.spent.denoiser == 3 * said.denoiser <= 3 * budget * STEPS
    assert (task.spent.decodes, task.spent.rewards) == (3 * said.decodes, 3 * said.rewards)
    assert set(out.trace["calls_left"]) == {math.floor(budget * STEPS) - said.denoiser}
    assert task.spent.denoiser_gradients == 0


@pytest.mark.parametrize("search", ALL, ids=shown)
@pytest.mark.parametrize("batch", [2, 5])
def test_a_sample_depends_neither_on_the_batch_nor_on_other_prompts(search: Search, batch: int) -> None:
    wanted, _ = drawn(search, prompts=4, batch=32)
    pieces, task = drawn(search, prompts=4, batch=batch)
    assert_close(pieces.latents, wanted.latents)
    alone = run(search, task, points(task, 1), generators(1, first=2))
    assert_close(alone.latents, wanted.latents[2:3])


@pytest.mark.parametrize("search", ALL, ids=shown)
def test_no_more_samples_are_denoised_and_scored_at_once_than_the_batch_allows(search: Search) -> None:
    reward = Asked(differentiable=False)
    task = task_of(reward, batch=3, budget=5.0)
    denoised = recorded_batches(task)
    run(search, task, points(task, 7), generators(7))
    assert 1 < max(reward.batches) <= 3
    assert 1 < max(denoised) <= 3


@pytest.mark.parametrize("search", ALL, ids=shown)
def test_a_search_finds_more_than_a_plain_sample_and_returns_what_it_scored(search: Search) -> None:
    out, _ = drawn(search, prompts=24, batch=256)
    plain, _ = drawn(BestOfN(), prompts=24, batch=256, budget=1.0)
    assert float((out.rewards - plain.rewards).mean()) > 0.15
    assert_close(out.rewards, bimodal(out.latents))


@pytest.mark.parametrize("search", ALL, ids=shown)
def test_the_gain_is_gone_when_the_search_is_told_nothing(search: Search) -> None:
    blind, _ = drawn(search, Asked(lambda x: torch.zeros(len(x))), prompts=64, batch=512)
    plain, _ = drawn(BestOfN(), prompts=64, batch=512, budget=1.0)
    assert abs(float((bimodal(blind.latents) - plain.rewards).mean())) < 0.15


@pytest.mark.parametrize("search", ALL, ids=shown)
def test_a_missing_reward_never_wins(search: Search) -> None:
    class Left(Asked):
        def raw(self, media: Tensor, prompts: Sequence[str]) -> list[float | None]:
            return [None if x > 0 else float(x) for x in media[:, 0]]

    out, _ = drawn(search, Left(differentiable=False), prompts=4, budget=9.0)
    assert out.rewards.isfinite().all()
    assert (out.latents[:, 0] <= 0).all()


@pytest.mark.parametrize("over", ["noise", "paths"])
def test_a_budget_of_one_is_the_plain_sample(over: str) -> None:
    out, _ = drawn(Search(over=over), budget=1.0)  # type: ignore[arg-type]
    plain, _ = drawn(BestOfN(), budget=1.0)
    assert_close(out.latents, plain.latents)


def test_options_of_another_search_are_refused_rather_than_ignored() -> None:
    with pytest.raises(RecipeError, match=r"step=0\.2 belongs to a search over noise and over='drafts'"):
        Search(over="drafts", step=0.2)
    with pytest.raises(RecipeError, match="expected one of noise, paths, drafts"):
        Search(over="seeds")  # type: ignore[arg-type]
    assert method_of('search(over="paths", branches=3)') == Search(over="paths", branches=3)


@pytest.mark.parametrize(
    "wrong", [{"neighbours": 0}, {"starts": 0}, {"step": 0.0}, {"step": 1.5}]
    + [{"over": "paths", **one} for one in ({"checks": ()}, {"checks": (0.6, 0.3)}, {"checks": (0.5, 1.0)})]
    + [{"over": "paths", **one} for one in ({"keep": 0.0}, {"branches": 0}, {"back": 0.0})]
    + [{"over": "drafts", "winners": 0}],
    ids=str,
)  # fmt: skip
def test_impossible_values_are_refused(wrong: dict[str, Any]) -> None:
    name = next(reversed(wrong))
    with pytest.raises(RecipeError, match=f"{name}="):
        Search(**wrong)


# over noise


def test_a_neighbour_is_as_long_as_its_noise_and_as_far_as_the_step_says() -> None:
    rng = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(3, 20_000, generator=rng, dtype=torch.float64) for _ in range(2))
    near = neighbour(z, eps, 0.3)
    assert_close(near, math.sqrt(1 - 0.09) * z + 0.3 * eps)
    assert_close(near.std(1), torch.ones(3, dtype=torch.float64), rtol=0.02, atol=0)
    cosine = torch.cosine_similarity(near, z)
    assert_close(cosine, torch.full_like(cosine, math.sqrt(1 - 0.09)), rtol=0.02, atol=0)


def test_positions_that_are_no_noise_stay() -> None:
    z, eps = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -2.0])
    assert_close(neighbour(z, eps, 0.6), torch.tensor([1.0, 0.8 * 2.0 - 0.6 * 2.0]))


def test_a_search_over_noise_with_whole_steps_is_the_best_of_n() -> None:
    out, _ = drawn(Search(step=1.0), budget=7.0)
    wanted, _ = drawn(BestOfN(), budget=7.0)
    assert torch.equal(out.latents, wanted.latents)


def test_a_search_over_noise_is_the_loop_written_out() -> None:
    out, task = drawn(Search(starts=2, neighbours=2, step=0.4), budget=5.0, prompts=1)
    cond, policy = points(task, 1), exact_policy()

    def run_from(z: Tensor) -> Tensor:
        return policy.rollout(cond, deterministic(STEPS), generators(1), latents=z).x0

    draws = [policy.initial_latents(cond, [one]) for one in streams(generators(1), 5)]
    tried = [(float(bimodal(run_from(z))), z) for z in draws[:2]]
    for round_of in (draws[2:4], draws[4:5]):
        best = max(tried, key=lambda pair: pair[0])[1]
        noises = [math.sqrt(1 - 0.16) * best + 0.4 * eps for eps in round_of]
        tried += [(float(bimodal(run_from(z))), z) for z in noises]
    reward, z = max(tried, key=lambda pair: pair[0])
    assert_close(out.latents, run_from(z))
    assert float(out.rewards) == pytest.approx(reward)


def test_more_noises_are_never_worse() -> None:
    before = torch.full((6,), -torch.inf)
    for budget in range(1, 9):
        out, _ = drawn(Search(), prompts=6, budget=budget)
        assert (out.rewards >= before).all()
        before = out.rewards


def test_first_latents_that_hold_a_picture_are_refused() -> None:
    rng = torch.Generator().manual_seed(0)
    picture, one, other = (torch.randn(2, 500, generator=rng) for _ in range(3))
    require_pure_noise(one, other, "a search over noise")
    # Positions that never change are no sign of a picture under the noise.
    require_pure_noise(torch.cat([picture, one], 1), torch.cat([picture, other], 1), "a search over noise")
    with pytest.raises(RecipeError, match=r"correlate by 0\.[23].*best_of_n"):
        require_pure_noise(0.6 * picture + 0.8 * one, 0.6 * picture + 0.8 * other, "a search over noise")


# over paths


def test_the_stretches_of_a_search_over_paths_are_counted_by_hand() -> None:
    search = Search(over="paths", checks=(0.3, 0.6), keep=0.5, branches=2, back=0.2)
    parts = stretches_from(search, 10, 4)
    assert [(p.begin, p.end, p.back, p.kept, p.runs) for p in parts] == [
        (0, 3, 0, 0, 4),
        (3, 6, 1, 2, 4),
        (6, 10, 4, 2, 4),
    ]
    assert [p.calls for p in parts] == [4 * 3, 2 * 3 + 2 * 5, 2 * 4 + 2 * 6]
    assert stretches(search, 10, 4.8) == parts
    assert stretches(search, 10, 4.7)[0].runs == 3


def test_pruning_keeps_half_of_the_runs_at_every_check_and_renders_the_rest() -> None:
    parts = stretches_from(Search(over="paths", checks=(0.3, 0.6), branches=1), 10, 8)
    assert [(p.kept, p.runs) for p in parts] == [(0, 8), (4, 4), (2, 2)]
    assert sum(p.calls for p in parts) == 8 * 3 + 4 * 3 + 2 * 4


@pytest.mark.parametrize("num_steps", [1, 2, 3, 28])
def test_a_search_over_paths_fits_any_number_of_steps(num_steps: int) -> None:
    _, task = drawn(Search(over="paths", checks=(0.01, 0.02, 0.99)), budget=3.0, num_steps=num_steps)
    assert 0 < task.spent.denoiser <= 3 * 3 * num_steps


def test_each_prompt_keeps_its_own_best_runs() -> None:
    latents = torch.arange(6.0).reshape(3, 2, 1)
    totals = torch.tensor([[0.1, 5.0], [0.3, math.nan], [0.2, 7.0]])
    assert_close(top(latents, totals, 2)[..., 0], torch.tensor([[2.0, 5.0], [4.0, 1.0]]))


def test_runs_are_judged_by_the_clean_estimate_of_their_last_step() -> None:
    task = task_of(Asked(lambda x: x[:, 0] + 10 * x[:, 1]))
    cond, policy = points(task, 2), exact_policy()
    x, totals = judged(task, cond, Group(by_slot(generators(2), 1)), 4)
    before = policy.rollout(cond, deterministic(STEPS), streams(generators(2), 1), stop=3).x0
    sigma = float(cond.sigmas[3])
    estimate = before - sigma * policy.velocity(before, sigma)
    assert_close(totals[0], estimate[:, 0] + 10 * estimate[:, 1])
    assert_close(x[0], policy.rollout(cond, deterministic(STEPS), streams(generators(2), 1), stop=4).x0)


def test_survivors_that_branch_nowhere_finish_as_the_plain_runs_they_are() -> None:
    out, _ = drawn(Search(over="paths", branches=1, checks=(0.5,)), budget=6.0)
    width = stretches(Search(over="paths", branches=1, checks=(0.5,)), STEPS, 6.0)[0].runs
    task = task_of(Asked())
    plain = torch.stack([f.x0 for f in rendered(task, points(task, 3), Group(by_slot(generators(3), width)))])
    distance = (plain - out.latents).norm(dim=-1).amin(0)
    assert_close(distance, torch.zeros(3), atol=1e-5, rtol=0)


def test_copies_of_a_survivor_go_back_by_fresh_noise_of_their_own_stream() -> None:
    task = task_of(Asked())
    cond, x = points(task, 2), torch.tensor([[[1.0, -1.0], [0.5, 2.0]]])
    own, new = branched(task, cond, by_slot(generators(2), 3), x, Stretch(begin=4, end=8, back=2, kept=1, runs=3))
    assert (own.start, new.start) == (4, 2)
    assert own.latents is not None and new.latents is not None
    assert torch.equal(own.latents, x)
    low, high = 0.5, 0.75
    a = (1 - high) / (1 - low)
    for latents, slot in zip(new.latents, by_slot(generators(2), 3)[1:], strict=True):
        eps = torch.stack([torch.randn(2, generator=one) for one in slot])
        assert_close(latents, a * x[0] + math.sqrt(high**2 - a**2 * low**2) * eps)
    _, fresh = branched(task, cond, by_slot(generators(2), 3), x, Stretch(begin=1, end=8, back=0, kept=1, runs=3))
    assert (fresh.start, fresh.latents) == (0, None)


def test_branches_are_spread_as_the_mixture_is() -> None:
    """Taken back and run again, copies of one run have the marginals of the model: here, most stay in their mode."""
    task = task_of(Asked(), num_steps=40)
    cond = points(task, 400)
    mean, std = [], []
    for back in (0.1, 0.6):
        search = Search(over="paths", checks=(0.7,), back=back)
        slots = by_slot(generators(400), 2)
        x, totals = judged(task, cond, Group(slots), 28)
        part = stretches_from(search, 40, 2)[1]
        own, new = branched(task, cond, slots, top(x, totals, 1), part)
        first = next(rendered(task, cond, own)).x0
        second = next(rendered(task, cond, new)).x0
        mean.append(float((first - second).norm(dim=1).mean()))
        std.append(float((second - task.policy.mixture.centres(second)[task.policy.mixture.mode_of(second)]).std()))
    assert mean[0] < 0.5 < mean[1]
    assert std == pytest.approx([0.35, 0.35], rel=0.15)


# over drafts


def test_drafts_and_their_full_renders_begin_with_the_same_noise() -> None:
    task = task_of(Asked(), budget=3.0)
    cond = points(task, 2)
    out = over_drafts(Search(over="drafts"), task, cond, generators(2))
    count, steps = Search(over="drafts").drafts(STEPS, 3.0)
    assert (count, steps) == (8, 2)
    policy = exact_policy()
    short = policy.condition(cond.prompts, num_steps=2)
    own = by_slot(generators(2), 8)
    drafts = torch.stack([bimodal(policy.rollout(short, deterministic(2), slot).x0) for slot in own])
    own = by_slot(generators(2), 8)
    full = torch.stack([policy.rollout(cond, deterministic(STEPS), slot).x0 for slot in own])
    assert_close(out.x0, full[drafts.argmax(0), [0, 1]])


def test_drafts_that_leave_nothing_to_choose_from_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"budget=1 leaves 0 drafts of 2 steps.*at least 1\.50"):
        drawn(Search(over="drafts"), budget=1.0)
    with pytest.raises(RecipeError, match=r"draft_steps=9 must be one of 1\.\.8"):
        drawn(Search(over="drafts", draft_steps=9), budget=4.0)
    drawn(Search(over="drafts"), budget=1.5)


def test_a_missing_total_compares_as_the_smallest() -> None:
    assert comparable(torch.tensor([math.nan, 1.0])).tolist() == [-math.inf, 1.0]


@pytest.mark.parametrize(("num_steps", "budget", "allowed"), [(10, 4.0, 40), (10, 0.3 * 3 + 0.1, 10), (7, 1.5, 10)])
def test_the_allowance_is_whole_calls(num_steps: int, budget: float, allowed: int) -> None:
    assert allowance(num_steps, budget) == allowed


# pipelines


@pytest.mark.parametrize("name", ["sd3", "sd15"])
@pytest.mark.parametrize("over", ["noise", "paths", "drafts"])
def test_a_search_with_a_black_box_reward_on_a_pipeline_stays_within_its_budget(name: str, over: str) -> None:
    call = {**ZOO[name].call, "guidance_scale": 4.0}
    with Policy(shared(name)) as policy:
        cond = policy.condition(list(PROMPTS), num_steps=4, **call)
        task = Task(policy, Judges(contrast), 4, 3.0, batch=4)
        search = Search(over=over)  # type: ignore[arg-type]
        search.check(task)
        out = run(search, task, cond, generators(2))
        plain = run(BestOfN(), Task(policy, Judges(contrast), 4, 1.0), cond, generators(2))
    assert task.spent.denoiser <= 2 * 3 * 4
    assert_close(out.rewards, contrast(out.media, PROMPTS))
    if over == "noise":
        assert (out.rewards >= plain.rewards - 1e-6).all()


def test_a_draft_of_a_pipeline_is_the_pipelines_own_shorter_run() -> None:
    call = {**ZOO["sd3"].call, "guidance_scale": 4.0, "negative_prompt": ["bad", "dull"]}
    with Policy(shared("sd3")) as policy:
        cond = policy.condition(list(PROMPTS), num_steps=8, **call)
        task = Task(policy, Judges(contrast), 8, 3.0)
        short = with_steps(task, cond, 3)
        own = policy.condition(list(PROMPTS), num_steps=3, **call)
        assert_close(short.sigmas, own.sigmas)
        x = policy.rollout(short, deterministic(3), generators(2)).x0
        assert_close(x, policy.rollout(own, deterministic(3), generators(2)).x0)
        first = policy.initial_latents(short, generators(2))
        assert_close(first, policy.initial_latents(cond, generators(2)))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # diffusers' own grid of one step
def test_a_draft_grid_that_a_pipeline_does_not_have_is_refused() -> None:
    with Policy(shared("qwen_image")) as policy:
        cond = policy.condition(list(PROMPTS), num_steps=4, **{**ZOO["qwen_image"].call, "true_cfg_scale": 1.0})
        with pytest.raises(RecipeError, match="draft_steps=1.*no grid of one step"):
            with_steps(Task(policy, Judges(contrast), 4, 3.0), cond, 1)
        assert len(with_steps(Task(policy, Judges(contrast), 4, 3.0), cond, 2)) == 2
