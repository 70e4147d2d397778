"""Boxes given in the prompts: matching, the penalty for too many objects, and what cannot be read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy.optimize import linear_sum_assignment
from torchvision.transforms.v2.functional import pil_to_tensor

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.base import evaluate
from alignkit.rewards.detections import Detections
from alignkit.rewards.drawn_shapes import DrawnShapes
from alignkit.rewards.layout import BoxIoU, assignment, layout_of
from alignkit.types import Prompt

CUP, DOG = [0.1, 0.1, 0.5, 0.5], [0.6, 0.2, 0.9, 0.8]
COLUMNS: dict[str, Any] = {"boxes": [{"label": "cup", "box": CUP}, {"label": "dog", "box": DOG}]}


def laid_out(columns: dict[str, Any]) -> Prompt:
    return Prompt("a scene", id=3, columns=columns)


class KnownDetections:
    """A detector that finds the same in every image, cut to what is asked."""

    def __init__(self, *found: tuple[str, Sequence[float]], score: float = 0.9) -> None:
        boxes = torch.tensor([list(box) for _, box in found]).view(-1, 4)
        self.found = Detections(boxes, tuple(name for name, _ in found), torch.full((len(found),), score))

    def __call__(self, media: torch.Tensor, labels: Sequence[Sequence[str]]) -> list[Detections]:
        return [self.found[[i for i, own in enumerate(self.found.labels) if own in one]] for one in labels]


def score(detector: Any, columns: dict[str, Any] = COLUMNS, **options: Any) -> float:
    reward: Any = BoxIoU(detector=detector, **options)
    return evaluate(reward, torch.zeros(1, 3, 40, 80), [laid_out(columns)]).scores.item()


def test_the_assignment_has_the_largest_sum_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        gain = rng.random(rng.integers(1, 7, size=2)) * rng.integers(0, 2, size=(1, 1))
        gain[rng.random(gain.shape) < 0.3] = 0
        found, (rows, columns) = assignment(gain.tolist()), linear_sum_assignment(gain, maximize=True)
        assert sum(gain[pair] for pair in found) == pytest.approx(gain[rows, columns].sum())
        assert len({row for row, _ in found}) == len({column for _, column in found}) == len(rows)
    assert assignment([]) == [] and assignment([[]]) == []


def test_the_best_assignment_is_not_the_greedy_one() -> None:
    # greedy takes .9 and is left with .0; the best sum is .8 + .8
    assert assignment([[0.9, 0.8], [0.8, 0.0]]) == [(0, 1), (1, 0)]


def test_objects_in_their_boxes_score_one_and_a_missing_one_its_share() -> None:
    assert score(KnownDetections(("cup", CUP), ("dog", DOG))) == pytest.approx(1)
    assert score(KnownDetections(("cup", CUP))) == pytest.approx(0.5)
    assert score(KnownDetections()) == 0


def test_the_score_is_the_intersection_over_the_union() -> None:
    shifted = [0.2, 0.1, 0.6, 0.5]  # overlaps by .3 of .4, so 3/5 of the union
    assert score(KnownDetections(("cup", shifted), ("dog", DOG))) == pytest.approx((0.6 + 1) / 2)


def test_an_object_in_the_box_of_another_scores_nothing() -> None:
    assert score(KnownDetections(("cup", DOG), ("dog", CUP))) == 0


def test_covering_the_image_with_objects_does_not_pay() -> None:
    everywhere = [("cup", [x, y, x + 0.4, y + 0.4]) for x in (0.1, 0.3, 0.5) for y in (0.1, 0.3, 0.5)]
    exact = score(KnownDetections(("cup", CUP), ("dog", DOG)))
    many = score(KnownDetections(*everywhere, ("dog", DOG)))
    assert exact == pytest.approx(1) and many == pytest.approx(2 / 10)


def test_strict_wants_every_box_hit_and_nothing_else() -> None:
    near = [0.15, 0.1, 0.55, 0.5]
    assert score(KnownDetections(("cup", near), ("dog", DOG)), mode="strict") == 1
    assert score(KnownDetections(("cup", near), ("dog", DOG), ("dog", CUP)), mode="strict") == 0
    assert score(KnownDetections(("cup", [0.3, 0.1, 0.7, 0.5]), ("dog", DOG)), mode="strict") == 0


def test_weak_detections_do_not_count() -> None:
    assert score(KnownDetections(("cup", CUP), ("dog", DOG), score=0.2)) == 0


def test_boxes_may_be_lists_with_labels_beside_them_or_json_or_pixels() -> None:
    detector = KnownDetections(("cup", CUP), ("dog", DOG))
    assert score(detector, {"boxes": [CUP, DOG], "labels": ["cup", "dog"]}) == pytest.approx(1)
    assert score(detector, {"boxes": json.dumps(COLUMNS["boxes"])}) == pytest.approx(1)
    pixels = [[8, 4, 40, 20], [48, 8, 72, 32]]  # of 80 x 40
    assert score(detector, {"boxes": pixels, "labels": ["cup", "dog"]}, units="pixel") == pytest.approx(1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "0 boxes and 0 labels"),
        ({"boxes": [CUP]}, "1 boxes and 0 labels"),
        ({"boxes": [CUP], "labels": ["cup", "dog"]}, "1 boxes and 2 labels"),
        ({"boxes": "cup"}, "is no JSON"),
        ({"boxes": [[0.5, 0.1, 0.1, 0.5]], "labels": ["cup"]}, "each side longer than 0"),
        ({"boxes": [[0.1, 0.1, 0.5]], "labels": ["cup"]}, r"expected \[left, top"),
        ({"boxes": [[8, 4, 40, 20]], "labels": ["cup"]}, "units='pixel'"),
    ],
)
def test_a_prompt_whose_boxes_cannot_be_read_is_named(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=f"prompt 3 .*{message}"):
        BoxIoU().check_prompts([laid_out(COLUMNS), laid_out(columns)])


def test_unknown_options_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"mode": "soft"}, {"units": "percent"}]
    for options in wrong:
        with pytest.raises(RecipeError, match=next(iter(options))):
            BoxIoU(**options)


def test_a_drawn_picture_is_scored_by_where_its_shapes_are() -> None:
    picture = Image.new("RGB", (100, 50), "white")
    pen = ImageDraw.Draw(picture)
    pen.rectangle((10, 10, 29, 29), fill=(40, 80, 200))
    pen.ellipse((60, 10, 89, 39), fill=(220, 30, 30))
    media = (pil_to_tensor(picture).float() / 255)[None].repeat(3, 1, 1, 1)
    right = [{"label": "square", "box": [0.1, 0.2, 0.3, 0.6]}, {"label": "circle", "box": [0.6, 0.2, 0.9, 0.8]}]
    swapped = [{**one, "box": other["box"]} for one, other in zip(right, reversed(right), strict=True)]
    prompts = [laid_out({"boxes": boxes}) for boxes in (right, right[:1], swapped)]
    reward: Any = BoxIoU(detector=DrawnShapes())
    found = evaluate(reward, media, prompts).scores
    assert found.tolist() == pytest.approx([1, 1, 0], abs=0.02)


def test_the_tiny_detector_runs_and_scores_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    reward: Any = BoxIoU(**BoxIoU.tiny(tmp_path), threshold=0.25)
    media = torch.rand(2, 3, 48, 96, generator=torch.Generator().manual_seed(0))
    prompts = [laid_out({"boxes": [[0.1, 0.1, 0.9, 0.9]], "labels": [name]}) for name in ("dog", "person")]
    reward.check_prompts(prompts)
    together = evaluate(reward, media, prompts).scores
    alone = [evaluate(reward, media[[i]], prompts[i : i + 1]).scores.item() for i in range(2)]
    assert together.tolist() == pytest.approx(alone, abs=1e-6) and 0 < together.max() < 1


def test_a_layout_keeps_the_order_of_the_prompt() -> None:
    layout = layout_of(laid_out(COLUMNS), "fraction")
    assert layout.labels == ("cup", "dog")
    torch.testing.assert_close(layout.boxes, torch.tensor([CUP, DOG]))
