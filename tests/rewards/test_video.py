"""Which frames are looked at, InstructVideo's sparse and attenuated reward, and statistics of motion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards import evaluate, load
from alignkit.rewards.base import Reward
from alignkit.rewards.frames import count_at_rate, every_nth, middles, one_per_segment, segments, uniform
from alignkit.rewards.loading import describe
from alignkit.rewards.optical_flow import optical_flow
from alignkit.rewards.video import FlowMagnitude, Segmental, temporal_attenuation
from alignkit.types import Prompt


class Brightness:
    """An image reward that counts the images it sees; None on black ones where asked to."""

    name, kind, differentiable = "brightness_seen", "image", True

    def __init__(self, skip_black: bool = False) -> None:
        self.skip_black, self.seen = skip_black, 0

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> Any:
        self.seen += len(media)
        scores = media.mean(dim=(1, 2, 3))
        return [None if self.skip_black and score == 0 else score for score in scores]


def numbered(num_frames: int, batch: int = 1) -> torch.Tensor:
    """Videos whose frame t is uniformly (t + 1) / 100."""
    values = (torch.arange(num_frames) + 1) / 100
    return values.reshape(1, -1, 1, 1, 1).expand(batch, num_frames, 3, 4, 4).clone()


def texture(size: int = 64, seed: int = 0) -> torch.Tensor:
    """(1, 1, size, size) smooth random pattern in [0, 1] that wraps around."""
    noise = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(seed))
    for _ in range(2):
        noise = F.avg_pool2d(F.pad(noise, (3, 3, 3, 3), mode="circular"), 7, 1)
    return (noise - noise.min()) / (noise.max() - noise.min())


def moving(places: Sequence[int], size: int = 64) -> torch.Tensor:
    """(1, T, 3, size, size): the texture, shifted right to these places."""
    frames = [texture(size).roll(place, -1) for place in places]
    return torch.stack(frames, dim=1).expand(1, len(places), 3, size, size).clone()


def score(reward: Any, media: torch.Tensor) -> float:
    return evaluate(load(reward) if isinstance(reward, str) else reward, media, ["a prompt"] * len(media)).scores.item()


DIFFERENCE, MAGNITUDE, SMOOTHNESS = (
    f"alignkit.rewards.video:{name}" for name in ("FrameDifference", "FlowMagnitude", "MotionSmoothness")
)


def test_frames_are_chosen_at_regular_places() -> None:
    assert every_nth(13, 4) == [0, 4, 8, 12]
    assert uniform(17, 4) == [0, 5, 11, 16]
    assert uniform(5, 1) == [0]
    assert middles(16, 4) == [1, 5, 9, 13]


@pytest.mark.parametrize(
    ("num_frames", "media_fps", "expected"),
    [
        (17, 24.0, 4),
        (41, 16.0, 6),
        (81, 16.0, 10),
        (48, 24.0, 4),
        (49, 8.0, 12),
        (5, 8.0, 4),
        (3, 8.0, 2),
        (2, 8.0, 2),
        (1, 8.0, 1),
    ],
)
def test_the_number_of_frames_at_a_rate_is_even_and_at_least_four_where_there_are_four(
    num_frames: int, media_fps: float, expected: int
) -> None:
    assert count_at_rate(num_frames, media_fps, fps=2.0) == expected


@pytest.mark.parametrize(("num_frames", "count"), [(16, 4), (13, 4), (7, 7), (9, 2)])
def test_segments_cover_every_frame_once_and_a_random_frame_comes_from_each(num_frames: int, count: int) -> None:
    parts = segments(num_frames, count)
    assert [frame for part in parts for frame in part] == list(range(num_frames))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    drawn = [one_per_segment(num_frames, count, torch.Generator().manual_seed(seed)) for seed in range(50)]
    assert all(frame in part for frames in drawn for frame, part in zip(frames, parts, strict=True))
    assert {frames[0] for frames in drawn} == set(parts[0])


def test_more_frames_than_there_are_is_an_error() -> None:
    with pytest.raises(RecipeError, match="segments=5 of a video of 4 frames"):
        segments(4, 5)
    with pytest.raises(RecipeError, match="5 frames were asked of a video of 4"):
        uniform(4, 5)


def test_attenuation_is_symmetric_1_at_the_centre_and_e_to_the_minus_8_at_the_border_of_16_frames() -> None:
    weights = temporal_attenuation(torch.arange(17), 16, 1.0)
    torch.testing.assert_close(weights, weights.flip(0))
    assert weights.argmax() == 8 and weights[8] == 1
    assert weights[7].item() == pytest.approx(math.exp(-1)) and weights[0].item() == pytest.approx(math.exp(-8))


@pytest.mark.parametrize("normalised", [True, False])
def test_segmental_is_instruct_videos_formula(normalised: bool) -> None:
    media, prompt = numbered(16), Prompt("a prompt", id=3)
    reward = Segmental(Brightness(), segments=4, attenuation=0.5, normalised=normalised)
    picked = reward.chosen(16, [prompt])[0].tolist()
    f = [math.exp(-0.5 * abs(g - 16 / 2)) for g in picked]
    r = [(g + 1) / 100 for g in picked]
    expected = sum(a * b for a, b in zip(f, r, strict=True)) / (sum(f) if normalised else 4)
    assert evaluate(reward, media, [prompt]).scores.item() == pytest.approx(expected, rel=1e-5)


def test_only_the_chosen_frames_are_scored_and_get_a_gradient() -> None:
    inner = Brightness()
    reward = Segmental(inner, segments=4)
    media = numbered(16, batch=2).requires_grad_()
    prompts = [Prompt("a", id=1), Prompt("b", id=2)]
    evaluate(reward, media, prompts).scores.sum().backward()
    assert inner.seen == 8
    assert media.grad is not None
    touched = [grad.flatten(1).any(dim=1).nonzero().flatten().tolist() for grad in media.grad]
    assert touched == reward.chosen(16, prompts).tolist()


def test_frames_depend_on_the_prompt_and_the_seed_and_on_nothing_else() -> None:
    reward = Segmental(Brightness())
    one, two = Prompt("a", id=1), Prompt("a", id=2)
    together = reward.chosen(64, [one, two, one])
    assert torch.equal(together[0], together[2]) and not torch.equal(together[0], together[1])
    assert torch.equal(together[1:2], reward.chosen(64, [two]))
    assert not torch.equal(Segmental(Brightness(), seed=1).chosen(64, [one])[0], together[0])
    assert Segmental(Brightness(), frames="middle").chosen(16, [one, two]).tolist() == [[1, 5, 9, 13]] * 2


def test_frames_to_which_the_image_reward_does_not_apply_leave_the_mean() -> None:
    media = numbered(16, batch=2)
    media[0, 5:], media[1] = 0, 0
    reward = Segmental(Brightness(skip_black=True), frames="middle")
    evaluation = evaluate(reward, media, ["a", "b"])
    assert evaluation.applicable.tolist() == [True, False]
    assert evaluation.scores[0].item() == pytest.approx(0.02) and evaluation.scores[1].isnan()


def test_no_attenuation_is_the_plain_mean_of_the_frames() -> None:
    assert score(Segmental(Brightness(), attenuation=0.0, frames="middle"), numbered(16)) == pytest.approx(0.08)


def test_segmental_takes_any_image_reward_by_its_spec_and_records_it() -> None:
    reward = load('alignkit.rewards.video:Segmental(reward="brightness", segments=2, frames="middle")')
    assert isinstance(reward, Reward) and reward.kind == "video" and reward.differentiable
    assert describe(reward)["per_frame"]["name"] == "brightness"
    with pytest.raises(RecipeError, match="needs a reward of single images; 'flow_magnitude' scores video"):
        Segmental(FlowMagnitude())
    with pytest.raises(RecipeError, match="frames='last'"):
        Segmental(Brightness(), frames="last")


def test_segmental_refuses_a_reward_that_compares_groups() -> None:
    class Ranks(Brightness):
        groupwise = True

    with pytest.raises(RecipeError, match="Segmental needs a reward of single images; 'brightness_seen' scores groups"):
        Segmental(Ranks())


def test_normalised_scores_of_long_videos_do_not_underflow() -> None:
    media = numbered(400)
    for seed in range(5):
        reward = Segmental(Brightness(), segments=1, seed=seed)
        (frame,) = reward.chosen(400, [Prompt("a", id=0)])[0].tolist()
        assert evaluate(reward, media, [Prompt("a", id=0)]).scores.item() == pytest.approx((frame + 1) / 100)
    media[:, 50:350] = 0  # the frames that weigh most do not apply
    reward = Segmental(Brightness(skip_black=True), segments=4, frames="middle")
    (index,) = reward.chosen(400, [Prompt("a")]).tolist()
    assert index == [49, 149, 249, 349] and score(reward, media) == pytest.approx(0.5)


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, -2), (3, 2), (-5, 3)])
def test_optical_flow_finds_the_translation_of_a_pattern(shift: tuple[int, int]) -> None:
    image = texture(96)
    flow = optical_flow(image, image.roll(shift, (-1, -2)))[..., 16:-16, 16:-16]
    expected = torch.tensor(shift, dtype=torch.float32).reshape(1, 2, 1, 1).expand_as(flow)
    torch.testing.assert_close(flow.mean(dim=(2, 3)), expected[..., 0, 0], atol=0.1, rtol=0)
    assert (flow - expected).norm(dim=1).mean() < 0.3


def test_a_still_video_has_no_motion_and_no_roughness() -> None:
    still = moving([0, 0, 0, 0])
    assert score(DIFFERENCE, still) == 0
    assert score(MAGNITUDE, still) == pytest.approx(0, abs=1e-4)
    assert score(SMOOTHNESS, still) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("speed", [1, 2, 3])
def test_the_magnitude_is_the_speed_in_pixels_per_frame(speed: int) -> None:
    places = [speed * t for t in range(4)]
    assert score(MAGNITUDE, moving(places, size=96)) == pytest.approx(speed, rel=0.1)


def test_the_magnitude_is_in_pixels_of_the_video_also_where_it_was_made_smaller() -> None:
    media = moving([0, 4, 8], size=128)
    assert score(FlowMagnitude(side=64), media) == pytest.approx(4, rel=0.1)


def test_shuffled_frames_change_more_and_move_less_steadily() -> None:
    steady, shuffled = moving([0, 1, 2, 3, 4, 5]), moving([3, 0, 5, 1, 4, 2])
    assert score(DIFFERENCE, shuffled) > 1.5 * score(DIFFERENCE, steady)
    assert score(SMOOTHNESS, shuffled) < score(SMOOTHNESS, steady) - 1


def test_steady_motion_is_smooth_and_jitter_is_not() -> None:
    assert score(SMOOTHNESS, moving([0, 2, 4, 6])) > -0.3
    assert score(SMOOTHNESS, moving([0, 2, 0, 2])) < -3


@pytest.mark.parametrize("name", [DIFFERENCE, MAGNITUDE, SMOOTHNESS])
def test_statistics_of_motion_have_gradients_and_do_not_depend_on_the_batch(name: str) -> None:
    media = torch.cat([moving([0, 1, 3]), moving([0, 2, 3]), moving([0, 0, 1])]).requires_grad_()
    reward = load(name)
    together = evaluate(reward, media, ["a"] * 3).scores
    alone = torch.cat([evaluate(reward, one.unsqueeze(0), ["a"]).scores for one in media])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(together.sum(), media)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize(("name", "needs"), [(DIFFERENCE, 2), (MAGNITUDE, 2), (SMOOTHNESS, 3)])
def test_a_video_too_short_for_the_statistic_is_an_error(name: str, needs: int) -> None:
    with pytest.raises(RewardError, match=f"at least {needs} frames; given {needs - 1}"):
        evaluate(load(name), moving([0] * (needs - 1)), ["a"])


def test_an_image_reward_on_every_frame_stills_a_clip_and_a_sparse_attenuated_one_does_not() -> None:
    """Clips with lag-1 correlation 0.9, moved uphill on the same image reward: what is left of their motion."""
    rng = torch.Generator().manual_seed(0)
    steps = torch.randn(16, 16, 3, 4, 4, generator=rng)
    clips = [steps[:, 0]]
    for t in range(1, 16):
        clips.append(0.9 * clips[-1] + (1 - 0.9**2) ** 0.5 * steps[:, t])
    start = 0.5 + 0.1 * torch.stack(clips, dim=1)

    def grey(media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        return -(media - 0.5).square().sum(dim=(1, 2, 3))

    grey.differentiable = True  # type: ignore[attr-defined]
    motion = load(DIFFERENCE)

    def kept(reward: Reward) -> float:
        media = start.clone().requires_grad_()
        for _ in range(20):
            (gradient,) = torch.autograd.grad(evaluate(reward, media, ["a"] * 16).scores.sum(), media)
            media = (media + gradient).detach().requires_grad_()
        prompts = ["a"] * 16
        return (evaluate(motion, media, prompts).scores / evaluate(motion, start, prompts).scores).mean().item()

    assert kept(Segmental(grey, segments=16, attenuation=0.0)) < 0.2
    assert kept(Segmental(grey, segments=4, attenuation=1.0)) > 0.8
