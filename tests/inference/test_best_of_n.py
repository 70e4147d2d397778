"""The best of n samples: streamed, one stream per sample, and a pipeline that stays as it was."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import alignkit
from alignkit.errors import RecipeError, RewardError
from alignkit.flow.plan import deterministic
from alignkit.inference.guide import generators_of, run
from alignkit.inference.method import BestOfN, best_of
from alignkit.inference.task import Found, streams
from alignkit.types import Scores
from recipes.mixture.world import bimodal
from tests.inference.point_tasks import STEPS, Asked, exact_policy, generators, points, recorded_batches, task_of
from tests.policy.test_untouched import portrait
from tests.policy.zoo import PROMPTS, ZOO, shared

CALL = {"height": 32, "width": 32, "guidance_scale": 4.0, "max_sequence_length": 8}


def contrast(media: Tensor, prompts: Sequence[str]) -> Tensor:
    """Standard deviation of the pixels."""
    return media.flatten(1).std(1)


def test_one_sample_is_the_plain_run_of_the_same_stream() -> None:
    task = task_of(Asked(), budget=1)
    cond = points(task, 5)
    drawn = run(BestOfN(), task, cond, generators(5))
    plain = exact_policy().rollout(cond, deterministic(STEPS), streams(generators(5), 1))
    assert torch.equal(drawn.latents, plain.x0)


def test_the_best_of_four_has_the_largest_reward_of_the_four_plain_runs() -> None:
    task = task_of(Asked(), budget=4)
    cond = points(task, 5)
    drawn = run(BestOfN(), task, cond, generators(5))
    plain = exact_policy().rollout(cond.repeat(4), deterministic(STEPS), streams(generators(5), 4))
    rewards = bimodal(plain.x0).reshape(5, 4)
    assert_close(drawn.rewards, rewards.amax(1))
    assert_close(drawn.latents, plain.x0.reshape(5, 4, 2)[range(5), rewards.argmax(1)])
    assert_close(drawn.parts["asked"], drawn.rewards)


def test_more_samples_are_never_worse() -> None:
    before = torch.full((6,), -torch.inf)
    for budget in range(1, 8):
        task = task_of(Asked(), budget=budget)
        rewards = run(BestOfN(), task, points(task, 6), generators(6)).rewards
        assert (rewards >= before).all()
        before = rewards
    assert before.std() > 0


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_sample_depends_neither_on_the_batch_nor_on_other_prompts(batch: int) -> None:
    task = task_of(Asked(), batch=16)
    wanted = run(BestOfN(), task, points(task, 5), generators(5))
    task = task_of(Asked(), batch=batch)
    together = run(BestOfN(), task, points(task, 5), generators(5))
    assert_close(together.latents, wanted.latents)
    alone = run(BestOfN(), task_of(Asked(), batch=batch), points(task, 1), generators(1, first=3))
    assert_close(alone.latents, wanted.latents[3:4])


@pytest.mark.parametrize("batch", [1, 4, 5])
def test_no_more_samples_are_denoised_and_scored_at_once_than_the_batch_allows(batch: int) -> None:
    reward = Asked()
    task = task_of(reward, budget=6, batch=batch)
    denoised = recorded_batches(task)
    run(BestOfN(), task, points(task, 7), generators(7))
    assert max(reward.batches) == max(denoised) == batch
    assert sum(reward.batches) == 42


@pytest.mark.parametrize("budget", [1.0, 2.5, 4.0])
def test_what_is_spent_is_what_was_said_and_within_the_budget(budget: float) -> None:
    task = task_of(Asked(), budget=budget)
    run(BestOfN(), task, points(task, 3), generators(3))
    said = BestOfN().calls(STEPS, budget)
    assert (task.spent.denoiser, task.spent.decodes, task.spent.rewards) == (
        3 * said.denoiser,
        3 * said.decodes,
        3 * said.rewards,
    )
    assert task.spent.denoiser <= budget * STEPS * 3


def found(*totals: float) -> Found:
    total = torch.tensor(totals)
    return Found(total[:, None], total[:, None], Scores(total, {"r": total}))


def test_a_missing_reward_never_wins_and_a_tie_goes_to_the_first() -> None:
    nan = float("nan")
    best = found(nan, 1.0, nan, 2.0).better(found(0.5, nan, nan, 2.0))
    assert_close(best.scores.total, torch.tensor([0.5, 1.0, nan, 2.0]), equal_nan=True)
    first, second = found(2.0), Found(torch.zeros(1, 1), torch.zeros(1, 1), found(2.0).scores)
    assert float(first.better(second).x0) == 2.0


class LeftOnly(Asked):
    """Scores points in the left half-plane; to others it does not apply."""

    def raw(self, media: Tensor, prompts: Sequence[str]) -> list[float | None]:
        return [None if x > 0 else float(x) for x in media[:, 0]]


def test_samples_to_which_the_reward_does_not_apply_lose_against_all_others() -> None:
    task = task_of(LeftOnly(differentiable=False), budget=8)
    drawn = run(BestOfN(), task, points(task, 4), generators(4))
    assert (drawn.latents[:, 0] <= 0).all()
    assert drawn.rewards.isfinite().all()


def test_a_reward_that_fails_stops_and_is_named() -> None:
    def broken(media: Tensor) -> Tensor:
        raise ValueError("no such character")

    task = task_of(Asked(broken, name="reader"))
    with pytest.raises(RewardError, match=r"'reader'.*no such character"):
        run(BestOfN(), task, points(task, 2), generators(2))


def test_a_budget_below_one_sample_is_refused() -> None:
    with pytest.raises(RecipeError, match="budget=0.5"):
        BestOfN().check(task_of(Asked(), budget=0.5))


def test_every_candidate_of_a_steered_best_of_is_steered() -> None:
    task, seen = task_of(Asked(), budget=3, batch=4), []

    def steering(cond):
        def stay(step):
            seen.append((step.index, len(step.latents)))
            return step

        return stay

    best_of(task, points(task, 2), generators(2), 3, steering=steering)
    assert sorted(seen) == sorted([(k, rows) for rows in (4, 2) for k in range(STEPS)])


# a pipeline


def test_a_pipeline_is_left_unmodified_and_the_media_are_what_its_best_noise_gives() -> None:
    pipe = ZOO["sd3"].build()
    before = portrait(pipe)
    out = alignkit.guide(pipe, list(PROMPTS), {contrast: 2.0}, budget=2, num_steps=3, judges=["brightness"], **CALL)
    assert portrait(pipe) == before
    assert out.media.shape == (2, 3, 32, 32)
    assert_close(out.rewards, 2.0 * contrast(out.media, PROMPTS))
    assert_close(out.parts["brightness"].shape, torch.Size([2]))
    assert out.trace["budget_used"] == 2.0


def test_more_samples_of_a_pipeline_are_never_worse_and_begin_with_the_plain_one() -> None:
    outs = [
        alignkit.guide(shared("sd3"), list(PROMPTS), contrast, budget=n, num_steps=3, batch=3, **CALL)
        for n in (1, 2, 3)
    ]
    assert (outs[1].rewards >= outs[0].rewards - 1e-6).all()
    assert (outs[2].rewards >= outs[1].rewards - 1e-6).all()
    with alignkit.Policy(shared("sd3")) as policy:
        cond = policy.condition(list(PROMPTS), num_steps=3, **CALL)
        own = streams(generators_of(None, 2), 1)
        assert_close(outs[0].latents, policy.rollout(cond, deterministic(3), own).x0)
