"""Region maps (SRUM): the released code's formula, the signed one, boxes, and the reward around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards import load
from alignkit.rewards.base import Mapped, Reward
from alignkit.rewards.region_map import (
    RegionMap,
    Regions,
    check_boxes,
    grid_boxes,
    region_map,
    regions_of,
    resized,
)
from alignkit.types import Prompt

H, W = 12, 20
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def released_in_pixels(
    boxes: Sequence[tuple[int, int, int, int]], scores: Sequence[float], overall: float | None
) -> np.ndarray:
    """SRUM's steps as published, boxes (x1, y1, x2, y2) in pixels."""
    region = np.full((H, W), 0.5)
    for (x1, y1, x2, y2), s in zip(boxes, scores, strict=True):
        region[y1:y2, x1:x2] = np.maximum(region[y1:y2, x1:x2], (s + 1) / 2)
    g = 0.0 if overall is None else overall
    return region * (g + 1) / 2


@pytest.mark.parametrize("overall", [None, -1.0, 0.2, 1.0])
def test_released_is_a_literal_transcription(overall: float | None) -> None:
    pixels = [(0, 0, 10, 6), (5, 3, 20, 12), (15, 0, 20, 3)]
    scores = [0.9, 0.4, -0.7]
    boxes = torch.tensor([(a / W, b / H, c / W, d / H) for a, b, c, d in pixels])
    found = region_map(boxes, torch.tensor(scores), overall, H, W, "released")
    torch.testing.assert_close(found.double(), torch.from_numpy(released_in_pixels(pixels, scores, overall)))


def test_without_regions_a_released_map_is_a_half_everywhere_and_a_signed_one_says_nothing() -> None:
    none = torch.empty(0, 4), torch.empty(0)
    torch.testing.assert_close(region_map(*none, 1.0, H, W, "released"), torch.full((H, W), 0.5))
    torch.testing.assert_close(region_map(*none, None, H, W, "released"), torch.full((H, W), 0.25))
    torch.testing.assert_close(region_map(*none, 1.0, H, W, "signed"), torch.zeros(H, W))


def test_a_region_below_zero_has_no_effect_as_released_and_repels_when_signed() -> None:
    boxes, scores = torch.tensor([LEFT, RIGHT]), torch.tensor([-0.8, 0.6])
    released = region_map(boxes, scores, 1.0, H, W, "released")
    torch.testing.assert_close(released[:, : W // 2], torch.full((H, W // 2), 0.5))
    signed = region_map(boxes, scores, 1.0, H, W, "signed")
    torch.testing.assert_close(signed[:, : W // 2], torch.full((H, W // 2), -0.8))
    torch.testing.assert_close(signed[:, W // 2 :], torch.full((H, W // 2), 0.6))


def test_overlapping_signed_boxes_give_the_mean_weighted_by_area() -> None:
    boxes = torch.tensor([(0.0, 0.0, 1.0, 1.0), LEFT])
    found = region_map(boxes, torch.tensor([0.5, -1.0]), 1.0, H, W, "signed")
    torch.testing.assert_close(found[0, 0].item(), (1.0 * 0.5 + 0.5 * -1.0) / 1.5)
    torch.testing.assert_close(found[0, -1].item(), 0.5)


def test_the_global_score_scales_the_whole_map() -> None:
    boxes, scores = torch.tensor([LEFT]), torch.tensor([0.6])
    for mode in ("released", "signed"):
        whole, half = (region_map(boxes, scores, g, H, W, mode) for g in (1.0, 0.0))
        torch.testing.assert_close(half, whole / 2)


def test_x_and_y_are_not_swapped() -> None:
    wide_and_low = torch.tensor([(0.0, 0.5, 1.0, 1.0)])  # the lower half
    found = region_map(wide_and_low, torch.tensor([1.0]), 1.0, H, W, "signed")
    assert (found[: H // 2] == 0).all()
    assert (found[H // 2 :] == 1).all()


def test_a_map_on_the_latent_grid_keeps_its_sides() -> None:
    found = region_map(torch.tensor([RIGHT]), torch.tensor([1.0]), 1.0, 24, 64, "signed")
    small = resized(found[None], 3, 8)
    assert small.shape == (1, 3, 8)
    torch.testing.assert_close(small[0], torch.tensor([[0.0] * 4 + [1.0] * 4] * 3))


@pytest.mark.parametrize(
    "box", [(0.0, 0.0, 32.0, 24.0), (0.5, 0.0, 0.2, 1.0), (-0.1, 0.0, 0.5, 0.5), (0.2, 0.3, 0.2, 0.9)]
)
def test_boxes_in_pixels_reversed_or_outside_are_refused(box: tuple[float, ...]) -> None:
    with pytest.raises(RewardError, match=r"prompt 3: box 0 .* fractions"):
        check_boxes(torch.tensor([box]), "prompt 3")


def test_a_box_thinner_than_a_pixel_still_covers_one() -> None:
    found = region_map(torch.tensor([(0.99, 0.0, 1.0, 0.01)]), torch.tensor([1.0]), 1.0, H, W, "signed")
    assert found[0, -1] == 1
    assert found.sum() == 1


def test_scores_outside_their_range_or_not_one_per_box_are_refused() -> None:
    boxes = torch.tensor([LEFT])
    for scores, overall in ((torch.tensor([1.5]), 0.0), (torch.tensor([0.5]), 2.0), (torch.tensor([float("nan")]), 0)):
        with pytest.raises(RewardError, match=r"\[-1, 1\]"):
            region_map(boxes, scores, overall, H, W)
    with pytest.raises(RewardError, match="one score per box"):
        region_map(boxes, torch.tensor([0.1, 0.2]), 0.0, H, W)


def test_grid_boxes_tile_the_image_row_by_row() -> None:
    boxes = grid_boxes(2, 4)
    assert boxes[0].tolist() == [0, 0, 0.25, 0.5]
    assert boxes[1].tolist() == [0.25, 0, 0.5, 0.5]
    assert boxes[7].tolist() == [0.75, 0.5, 1, 1]
    found = region_map(boxes, torch.ones(8), 1.0, H, W, "signed")
    torch.testing.assert_close(found, torch.ones(H, W))


def test_an_unreadable_answer_is_no_neutral_region() -> None:
    with pytest.raises(RewardError, match="no number"):
        regions_of(torch.tensor([LEFT]), torch.tensor([float("nan")]), 0.5)
    found = regions_of(torch.tensor([LEFT]), torch.tensor([0.75]), 0.25)
    torch.testing.assert_close(found.scores, torch.tensor([0.5]))
    assert found.overall == -0.5


@dataclass(frozen=True, eq=False)
class BrightHalves:
    """A judge that scores the left and right half by their brightness."""

    name: str = "bright_halves"
    bound: bool = False
    kind = "image"
    differentiable = False

    def bind(self, policy: object) -> BrightHalves:
        return BrightHalves(bound=True)

    def regions(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> list[Regions]:
        left, right = (media[..., part].mean(dim=(1, 2, 3)) for part in (slice(0, W // 2), slice(W // 2, None)))
        scores = torch.stack([left, right], dim=1) * 2 - 1
        return [Regions(torch.tensor([LEFT, RIGHT]), row, 1.0) for row in scores]

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        return media.mean(dim=(1, 2, 3))


def test_the_reward_maps_every_image_and_its_score_is_the_mean_of_the_map() -> None:
    reward = RegionMap(judge=BrightHalves())
    assert isinstance(reward, Reward)
    assert isinstance(reward, Mapped)
    media = torch.zeros(2, 3, H, W)
    media[0, ..., W // 2 :] = 1
    maps = reward.maps(media, [Prompt("a"), Prompt("b")])
    torch.testing.assert_close(maps[0], torch.tensor([[-1.0] * 10 + [1.0] * 10] * H))
    torch.testing.assert_close(maps[1], -torch.ones(H, W))
    torch.testing.assert_close(reward(media, [Prompt("a"), Prompt("b")]), torch.tensor([0.0, -1.0]))
    assert RegionMap(judge=BrightHalves(), size=(3, 5)).maps(media, [Prompt("a")] * 2).shape == (2, 3, 5)


def test_binding_a_region_map_binds_its_judge() -> None:
    bound = RegionMap(judge=BrightHalves()).bind(object())
    assert bound.judge.bound  # type: ignore[attr-defined]


def test_a_judge_without_regions_and_an_unknown_mode_are_refused() -> None:
    with pytest.raises(RecipeError, match="'brightness' scores no regions"):
        RegionMap(judge="brightness")
    with pytest.raises(RecipeError, match="mode='max'"):
        RegionMap(judge=load("brightness"), mode="max")  # type: ignore[arg-type]


def test_a_map_repairs_the_bad_halves_where_one_score_per_image_cannot() -> None:
    """Claim of SRUM: every image is half right, so that all have the same global score. The minimiser of the weighted
    flow-matching loss is, per pixel, the weighted mean of the images."""
    images = torch.ones(2, 8, 8)
    images[0, :, :4] = images[1, :, 4:] = -1
    halves = torch.tensor([LEFT, RIGHT])
    scores = torch.tensor([[-0.5, 1.0], [1.0, -0.5]])

    def learnt(weights: torch.Tensor) -> torch.Tensor:
        return (weights * images).sum(0) / weights.sum(0)

    by_map = {m: torch.stack([region_map(halves, s, 1.0, 8, 8, m) for s in scores]) for m in ("released", "signed")}  # type: ignore[arg-type]
    by_image = torch.stack([region_map(halves[:0], scores[0, :0], 0.25, 8, 8, "released")] * 2)
    torch.testing.assert_close(learnt(by_image), torch.zeros(8, 8))
    torch.testing.assert_close(learnt(by_map["released"]), torch.full((8, 8), (1 - 0.5) / (1 + 0.5)))
    assert (learnt(by_map["signed"]) >= 1).all(), "what is repelled pushes beyond the good value"
