"""The world of clips has its exact velocity, and what its claims are judged by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from alignkit.rewards.base import OfFrames
from recipes.clips.claims import ARMS, LEVELS, ROUNDS, SEEDS, STARTS, at_reward, kept_motion, learnt_faster
from recipes.clips.policy import ClipPolicy, Spot
from recipes.clips.train import REWARDS, measured, recipe, train
from recipes.clips.world import FRAMES, MEMORY, PROMPTS, Clips, frame_scores, lag_one, means, motion, wanted


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_clips_decay_as_they_should_and_are_about_their_picture() -> None:
    x = Clips().sample([PROMPTS[1]] * 2000, rng())
    assert float(lag_one(x)) == pytest.approx(MEMORY, abs=0.01)
    assert float(motion(x)) == pytest.approx(2 * (1 - MEMORY), rel=0.05)  # E (x' - x)^2 of unit variance
    assert_close(x.mean(dim=(0, 1)), means([PROMPTS[1]])[0, 0], rtol=0, atol=0.1)
    assert float(lag_one(x[:, torch.randperm(FRAMES, generator=rng())])) < MEMORY - 0.1


def test_the_velocity_is_the_mean_of_noise_less_clip_given_the_noised_clip() -> None:
    clips, sigma = Clips(), 0.6
    x = torch.randn(3, FRAMES, 64, generator=rng(), dtype=torch.float64)
    mean = means(PROMPTS[:3]).double()
    steps = torch.arange(FRAMES, dtype=torch.float64)
    axis = torch.arange(8, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    space = torch.exp(-(torch.cdist(points, points) ** 2) / (2 * clips.length**2))
    covariance = torch.kron(MEMORY ** (steps[:, None] - steps).abs(), space)
    # x_sigma = (1 - sigma) x0 + sigma eps is Gaussian: E[x0 | x] and E[eps | x] by linear regression
    total = (1 - sigma) ** 2 * covariance + sigma**2 * torch.eye(FRAMES * 64, dtype=torch.float64)
    away = torch.linalg.solve(total, (x - (1 - sigma) * mean).flatten(1).T).T
    clean = mean.expand_as(x).flatten(1) + (1 - sigma) * away @ covariance
    expected = (sigma * away - clean).view_as(x)
    assert_close(clips.velocity(x, torch.full((3,), sigma), mean), expected, rtol=1e-6, atol=1e-6)


def test_the_frame_reward_is_the_same_of_pixels_as_of_clips() -> None:
    policy = ClipPolicy()
    cond = policy.condition([PROMPTS[0]] * 2, 4)
    x = policy.clips.sample(cond.prompts, rng())
    media = policy.decode(x, cond, frames=5)
    assert media.shape == (2, 5, 3, 8, 8) and float(media.min()) >= 0 and float(media.max()) <= 1
    scores = torch.stack([Spot()(frame, cond.prompts) for frame in media.unbind(1)], dim=1)
    assert_close(scores, frame_scores(x)[:, :5], rtol=1e-4, atol=1e-4)
    still = wanted().expand(1, FRAMES, 64)
    assert_close(frame_scores(still), torch.zeros(1, FRAMES), rtol=0, atol=1e-6)


def test_the_arms_look_at_the_frames_that_their_names_say() -> None:
    from alignkit.types import Prompt

    prompts = [Prompt("", id=i) for i in range(40)]
    assert all(isinstance(reward, OfFrames) for reward in REWARDS.values())
    for name in ("dense", "attenuated"):
        assert REWARDS[name].chosen(FRAMES, prompts)[0].tolist() == list(range(FRAMES))
    for name in ("sparse", "both"):
        index = REWARDS[name].chosen(FRAMES, prompts)
        assert index.shape == (40, 4) and torch.equal(index // 4, torch.arange(4).expand(40, 4))
    assert {name: reward.attenuation for name, reward in REWARDS.items()} == {
        "dense": 0.0, "sparse": 0.0, "attenuated": 1.0, "both": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("start", [0.6, 1.0])
def test_rounds_raise_the_reward_of_the_trained_prompt_and_cost_what_they_should(start: float) -> None:
    policy, calls = ClipPolicy(), list[int]()
    before = measured(policy, 4)
    policy.calls = 0
    own = recipe("both", start=start, steps=4, num_steps=4, prompts_per_step=4)
    train(own, policy, lambda done: calls.append(policy.calls))
    each = 2 if start < 1 else 4 + 1  # steps of an edited clip; a whole run, whose last step is taken again
    assert calls == [4 * each * (step + 1) for step in range(4)]
    after = measured(policy, 4)
    assert after["reward"] > before["reward"] == before["base"]
    assert before["forgotten"] == 0.0 and before["motion"] == 1.0 and after["forgotten"] > 0.0


def rows_of(names: dict[str, Any], slope: float, calls: float = 1.0, forgotten: float = 0.0) -> list[dict[str, Any]]:
    """Runs whose motion falls by `slope` for each unit of reward above -1, seed by seed a little different."""
    return [
        {
            "arm": "both",
            "start": 0.6,
            **names,
            "seed": seed,
            "round": done,
            "reward": reward,
            "motion": 1 - slope * (reward + 1) + 0.001 * seed,
            "lag_one": 0.9,
            "calls": calls * done + seed,
            "forgotten": forgotten + 0.001 * seed,
        }
        for seed in SEEDS
        for done, reward in ((1, -1.0), (40, -0.5), (ROUNDS, -0.2))
    ]


def test_numbers_are_read_where_a_run_passes_a_reward() -> None:
    rows = rows_of({}, 1.0)
    assert at_reward(rows, "motion", -0.35, arm="both") == pytest.approx([0.35, 0.351, 0.352])
    assert at_reward(rows, "motion", -0.1) == [] == at_reward(rows, "motion", -2.0)


def test_the_verdict_on_motion_follows_it_at_equal_reward() -> None:
    def verdict(dense: float) -> str:
        return kept_motion(
            [row for arm in ARMS for row in rows_of({"arm": arm}, dense if arm == "dense" else 0.5)]
        ).verdict

    assert (verdict(0.9), verdict(0.5), verdict(0.1)) == ("holds", "fails", "fails")
    never = [{**row, "reward": row["reward"] - 1} for arm in ARMS for row in rows_of({"arm": arm}, 0.5)]
    assert kept_motion(never).verdict == "undecided" and len(LEVELS) == 3


def test_the_verdict_on_the_start_needs_fewer_calls_and_less_forgetting() -> None:
    def verdict(calls: float, forgotten: float) -> str:
        other = {0.6: (calls, forgotten)}
        rows = [row for s in STARTS for row in rows_of({"start": s}, 0.5, *other.get(s, (2.0, 0.5)))]
        return learnt_faster(rows).verdict

    assert verdict(1.0, 0.2) == "holds"
    assert verdict(1.0, 0.5) == "fails" == verdict(2.0, 0.2)
