"""From scored regions to a map of weights over the image (SRUM, 2510.12784).

Boxes are (left, top, right, bottom) in fractions of the image, so that no resize between the judge's picture and the
autoencoder's can move them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange, reduce

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.base import Reward
from alignkit.rewards.card import Card
from alignkit.rewards.loading import describe, load
from alignkit.rewards.parts import bound, check, files_of, prepare
from alignkit.rewards.weights import Files
from alignkit.types import Prompt

Mode = Literal["released", "signed"]
FLOOR = 0.5  # the released code's weight of what no box covers: (0 + 1) / 2


@dataclass(frozen=True)
class Regions:
    """What a judge says of the parts of one image.

    Attributes:
        boxes: (N, 4) left, top, right, bottom in [0, 1].
        scores: (N,) in [-1, 1]; 0 is neutral, below 0 should be repelled.
        overall: of the whole image, in [-1, 1]; None: the judge gave none, which counts as 0.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    overall: float | None = None


@runtime_checkable
class ScoresRegions(Protocol):
    """A judge that scores parts of an image."""

    def regions(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> list[Regions]:
        """One `Regions` for each of (B, 3, H, W)."""
        ...


def grid_boxes(rows: int, columns: int) -> torch.Tensor:
    """(rows * columns, 4): the image cut into equal boxes, row by row."""
    top, left = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    corners = torch.stack([left / columns, top / rows, (left + 1) / columns, (top + 1) / rows])
    return rearrange(corners, "side r c -> (r c) side")


def check_boxes(boxes: torch.Tensor, owner: str) -> torch.Tensor:
    """The boxes as (N, 4) float.

    Raises:
        RewardError: not (N, 4), outside [0, 1] (pixels instead of fractions), or without area; names `owner`.
    """
    given = torch.as_tensor(boxes).float().reshape(-1, 4) if torch.as_tensor(boxes).numel() % 4 == 0 else None
    rule = "expected (left, top, right, bottom) in fractions of the image, left < right and top < bottom"
    if given is None:
        raise RewardError(f"{owner}: boxes of shape {tuple(torch.as_tensor(boxes).shape)}; {rule}")
    for index, (left, top, right, bottom) in enumerate(given.tolist()):
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            shown = f"({left:g}, {top:g}, {right:g}, {bottom:g})"
            raise RewardError(f"{owner}: box {index} is {shown}; {rule}. Divide x by the width and y by the height")
    return given


def spans(box: Sequence[float], height: int, width: int) -> tuple[slice, slice]:
    """(rows, columns) of a box on a grid, at least one of each."""
    left, top, right, bottom = box
    first_row, first_column = min(round(top * height), height - 1), min(round(left * width), width - 1)
    return (
        slice(first_row, max(round(bottom * height), first_row + 1)),
        slice(first_column, max(round(right * width), first_column + 1)),
    )


def region_map(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    global_score: float | None,
    height: int,
    width: int,
    mode: Mode = "signed",
) -> torch.Tensor:
    """(height, width) weights of one image.

    "released" is what SRUM's published code computes: 0.5 everywhere, in a box the maximum of that and (s + 1) / 2,
    all times (g + 1) / 2. It lies in [0, 1], and a region scored below 0 has no effect. "signed" gives a box its score
    itself, overlapping boxes the mean weighted by their areas, what no box covers 0, all times (g + 1) / 2: it lies in
    [-1, 1] and repels where it is negative, as the paper describes.

    Args:
        boxes: (N, 4) left, top, right, bottom in [0, 1].
        scores: (N,) s in [-1, 1].
        global_score: g in [-1, 1]; None counts as 0.

    Raises:
        RewardError: boxes or scores that are none.
    """
    boxes = check_boxes(boxes, "region map")
    scores = torch.as_tensor(scores).float().reshape(-1)
    overall = 0.0 if global_score is None else float(global_score)
    if len(scores) != len(boxes):
        raise RewardError(f"region map: {len(boxes)} boxes and {len(scores)} scores; expected one score per box")
    if not all(-1 <= score <= 1 for score in [*scores.tolist(), overall]):
        raise RewardError(f"region map: scores {scores.tolist()}, global {overall}; expected numbers in [-1, 1]")
    if mode == "released":
        weights = torch.full((height, width), FLOOR)
        for box, score in zip(boxes.tolist(), scores.tolist(), strict=True):
            rows, columns = spans(box, height, width)
            weights[rows, columns] = weights[rows, columns].clamp(min=(score + 1) / 2)
    elif mode == "signed":
        weighted, area = torch.zeros(height, width), torch.zeros(height, width)
        for box, score in zip(boxes.tolist(), scores.tolist(), strict=True):
            size = (box[2] - box[0]) * (box[3] - box[1])
            rows, columns = spans(box, height, width)
            weighted[rows, columns] += size * score
            area[rows, columns] += size
        weights = torch.where(area > 0, weighted / area.clamp(min=1e-12), 0.0)
    else:
        raise RecipeError(f"mode={mode!r}; choose 'signed' (can repel) or 'released' (as the published code)")
    return weights * (overall + 1) / 2


def resized(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, height, width) of (B, H, W), bilinear: from pixels to the latent grid, as SRUM does."""
    return F.interpolate(maps[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]


@dataclass(frozen=True, eq=False)
class RegionMap:
    """A judge of regions as a reward with a map; the map's mean is its score.

    Attributes:
        judge: a reward that scores regions (spec or callable), such as `self_reward`.
        mode: see `region_map`.
        size: (height, width) of the maps; None: of the media.
    """

    judge: Any = "self_reward"
    mode: Mode = "signed"
    size: tuple[int, int] | None = None
    name: str = "region_map"

    kind = "image"
    differentiable = False
    card: ClassVar[Card] = Card(
        family="self",
        summary="mean over the image of what the judge says of its regions",
        range="[-1, 1]; mode released [0, 1]",
        cost="one question per region and one for the whole",
        columns=("boxes?",),
        source="SRUM 2510.12784, both as described (signed) and as released",
    )

    def __post_init__(self) -> None:
        if self.mode not in ("signed", "released"):
            raise RecipeError(f"mode={self.mode!r}; choose 'signed' (can repel) or 'released' (as the published code)")
        object.__setattr__(self, "judge", load(self.judge))
        if not isinstance(self.judge, ScoresRegions):
            raise RecipeError(
                f"judge={self.judge.name!r} scores no regions; choose a reward with "
                "regions(media, prompts) -> list[Regions], such as self_reward"
            )

    def bind(self, policy: Any) -> Reward:
        """The same map with its judge bound."""
        return dataclasses.replace(self, judge=bound(self.judge, policy))

    def files(self) -> tuple[Files, ...]:
        """As the judge's."""
        return files_of([self.judge])

    def prepare(self) -> None:
        """As the judge's."""
        prepare(self.judge)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """As the judge's."""
        check(self.judge, prompts)

    def describe(self) -> dict[str, Any]:
        """The judge and the mode."""
        return {"judge": describe(self.judge), "mode": self.mode}

    def maps(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B, h, w) weights of (B, 3, H, W)."""
        height, width = media.shape[-2:]
        found = self.judge.regions(media, prompts)
        made = [region_map(r.boxes, r.scores, r.overall, height, width, self.mode) for r in found]
        maps = torch.stack(made) if made else torch.empty(0, height, width)
        return resized(maps, *self.size).to(media.device) if self.size else maps.to(media.device)

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) mean of each map."""
        if len(media) == 0:
            return media.new_empty(0)
        return reduce(self.maps(media, prompts), "b h w -> b", "mean")


def signed(probability: torch.Tensor) -> torch.Tensor:
    """A probability of "yes" as a score in [-1, 1]; NaN stays NaN."""
    return 2 * probability - 1


def regions_of(boxes: torch.Tensor, probabilities: torch.Tensor, overall: float) -> Regions:
    """`Regions` from probabilities of "yes".

    Raises:
        RewardError: a probability is no number: an answer that could not be read is no score of 0.
    """
    if not probabilities.isfinite().all() or math.isnan(overall):
        raise RewardError(f"the judge gave no number for a region: {probabilities.tolist()}, whole image {overall}")
    return Regions(boxes, signed(probabilities), 2 * overall - 1)
