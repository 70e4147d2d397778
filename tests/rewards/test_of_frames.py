"""Rewards that look at some frames score the first frames of a video as they score the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from alignkit.errors import RecipeError
from alignkit.rewards import PerFrameMean, Weighted, evaluate, load
from alignkit.rewards.base import OfFrames
from alignkit.rewards.of_frames import frames_at
from alignkit.rewards.video import FrameDifference, Segmental
from alignkit.types import Prompt

FRAMES, PROMPTS = 16, [Prompt("a", id=1), Prompt("b", id=2), Prompt("c", id=3)]


class Brightness:
    """An image reward; None on the images that are darker than `least`."""

    name, kind, differentiable = "brightness_or_none", "image", True

    def __init__(self, least: float = 0.0) -> None:
        self.least = least

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> Any:
        return [score if score >= self.least else None for score in media.mean(dim=(1, 2, 3))]


class Norm:
    name, kind, differentiable = "norm", "latent", True

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        return media.flatten(1).norm(dim=1)


def videos() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.rand(len(PROMPTS), FRAMES, 1, 1, 1, generator=rng).expand(-1, -1, 3, 4, 4).clone()


REWARDS = {
    "random": lambda: Segmental(Brightness(), segments=2),
    "middle": lambda: Segmental(Brightness(), segments=2, frames="middle", normalised=False),
    "not applicable": lambda: Segmental(Brightness(least=0.2), segments=2, frames="middle"),
    "every third": lambda: PerFrameMean(Brightness(), nth=3),
}


@pytest.mark.parametrize("name", REWARDS)
def test_the_chosen_frames_alone_score_as_the_whole_video(name: str) -> None:
    reward, media = REWARDS[name](), videos()
    assert isinstance(reward, OfFrames)
    index = reward.chosen(FRAMES, PROMPTS)
    found = reward.of_frames(frames_at(media, index), index, FRAMES, PROMPTS)
    whole = evaluate(reward, media, PROMPTS)  # type: ignore[arg-type]
    torch.testing.assert_close(found.scores, whole.scores, equal_nan=True)
    assert torch.equal(found.applicable, whole.applicable)


@pytest.mark.parametrize("name", REWARDS)
def test_the_frames_that_a_batch_needs_score_as_the_whole_videos_with_gradients(name: str) -> None:
    weighted = Weighted([(REWARDS[name](), 2.0), (Norm(), 0.5)])
    media, latents = videos().requires_grad_(), torch.ones(3, 2)
    needed = weighted.frames_needed(FRAMES, PROMPTS)
    chosen = next(iter(weighted.rewards.values())).chosen(FRAMES, PROMPTS)  # type: ignore[attr-defined]
    assert needed == int(chosen.max()) + 1 < FRAMES or name == "every third"
    known = ~torch.isnan(weighted(media, PROMPTS, latents).total)
    grads, totals = [], []
    for given, num_frames in ((media[:, :needed], FRAMES), (media, None)):
        scores = weighted(given, PROMPTS, latents, num_frames=num_frames)
        totals.append(scores.total)
        grads += torch.autograd.grad(scores.total[known].sum(), media)
    torch.testing.assert_close(totals[0], totals[1], equal_nan=True)
    torch.testing.assert_close(grads[0], grads[1])


def test_a_reward_that_looks_at_the_last_frame_or_at_motion_needs_whole_videos() -> None:
    early = Segmental(Brightness(), segments=2, frames="middle")
    assert Weighted(early).frames_needed(FRAMES, PROMPTS) == 12
    assert Weighted([(early, 1.0), (PerFrameMean(Brightness(), nth=5), 1.0)]).frames_needed(FRAMES, PROMPTS) is None
    assert Weighted([(early, 1.0), (PerFrameMean(Brightness(), nth=4), 1.0)]).frames_needed(FRAMES, PROMPTS) == 13
    assert Weighted([(early, 1.0), (FrameDifference(), 0.0)]).frames_needed(FRAMES, PROMPTS) is None
    assert Weighted(Norm()).frames_needed(FRAMES, PROMPTS) is None


def test_too_few_frames_are_refused_and_not_scored_as_if_they_were_all() -> None:
    media = videos()
    weighted = Weighted(Segmental(Brightness(), segments=2, frames="middle"))
    with pytest.raises(RecipeError, match="look at the first 12"):
        weighted(media[:, :11], PROMPTS, num_frames=FRAMES)
    with pytest.raises(RecipeError, match="frame_difference look at the first 16"):
        Weighted(FrameDifference())(media[:, :12], PROMPTS, num_frames=FRAMES)
    assert not torch.equal(weighted(media[:, :12], PROMPTS).total, weighted(media, PROMPTS).total)


def test_every_nth_frame_is_a_spec_and_less_than_every_frame_is_refused() -> None:
    reward = load('per_frame_mean(reward="brightness", nth=4)')
    media = videos()
    torch.testing.assert_close(evaluate(reward, media, PROMPTS).scores, media[:, ::4].mean(dim=(1, 2, 3, 4)))
    with pytest.raises(RecipeError, match="nth=0"):
        PerFrameMean(Brightness(), nth=0)


def test_random_frames_change_with_the_round_and_are_one_choice_per_prompt_and_round() -> None:
    media, prompts = videos(), [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    media[2] = media[0]
    weighted = Weighted(Segmental(Brightness(), segments=2))
    found: list[list[float]] = []
    for key in (None, (0, "rollout", 0), (0, "rollout", 1), (0, "rollout", 0)):
        weighted.round = key
        scores = weighted(media, prompts).total
        needed = weighted.frames_needed(FRAMES, prompts)
        torch.testing.assert_close(weighted(media[:, :needed], prompts, num_frames=FRAMES).total, scores)
        assert scores[0] == scores[2]
        torch.testing.assert_close(weighted(media[1:2], prompts[1:2]).total, scores[1:2])
        found.append(scores.tolist())
    assert found[1] == found[3] and len({tuple(one) for one in found}) == 3


def test_a_reward_that_compares_groups_is_asked_about_whole_videos() -> None:
    class Ranks(Segmental):
        groupwise = True

    weighted = Weighted(Ranks(Brightness(), segments=2, frames="middle"))
    weighted.round = (0,)
    assert not weighted.sparse and weighted.frames_needed(FRAMES, PROMPTS) is None
    with pytest.raises(RecipeError, match="look at the first 16"):
        weighted(videos()[:, :12], PROMPTS, num_frames=FRAMES)
