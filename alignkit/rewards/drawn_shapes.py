"""A detector without weights for drawn pictures: plain shapes of one colour on a plain ground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch.nn import functional as F

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.detections import Detections
from alignkit.rewards.named_colours import COLOURS, nearest

FILLING = {"square": 1.0, "circle": torch.pi / 4, "triangle": 0.5}
"""Share of its bounding box that a shape covers; a rectangle counts as a square."""


@dataclass(frozen=True)
class DrawnShapes:
    """Finds squares, circles and triangles: connected pixels that are nearest to one colour name.

    The ground is the colour that most of the border has; shapes of its colour cannot be seen.

    Attributes:
        smallest: pixels below which a blob is noise.
    """

    smallest: int = 12

    def __post_init__(self) -> None:
        if self.smallest < 1:
            raise RecipeError(f"smallest={self.smallest}; expected at least one pixel")

    def check_labels(self, labels: Sequence[str]) -> None:
        """Raises RewardError for any other shape."""
        for label in labels:
            if label not in FILLING:
                raise RewardError(f"drawn shapes are {', '.join(FILLING)}; {label!r} is not among them")

    @torch.no_grad()
    def __call__(self, media: torch.Tensor, labels: Sequence[Sequence[str]]) -> list[Detections]:
        """The shapes in (B, 3, H, W), float in [0, 1]; a blob scores less the worse its filling fits."""
        return [self._of(image, wanted) for image, wanted in zip(media.cpu(), labels, strict=True)]

    def _of(self, image: torch.Tensor, wanted: Sequence[str]) -> Detections:
        height, width = image.shape[-2:]
        names = rearrange(nearest(rearrange(image, "c h w -> (h w) c")), "(h w) -> h w", h=height)
        border = torch.cat([names[0], names[-1], names[:, 0], names[:, -1]])
        ground = int(border.bincount(minlength=len(COLOURS)).argmax())
        boxes, found, scores, masks = [], [], [], []
        for blob in blobs(names, ground):
            rows, columns = blob.nonzero().unbind(1)
            top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
            filling = len(rows) / float((bottom - top) * (right - left))
            label = min(FILLING, key=lambda name: abs(FILLING[name] - filling))
            if len(rows) >= self.smallest and label in wanted:
                boxes.append(torch.stack([left / width, top / height, right / width, bottom / height]))
                found.append(label)
                scores.append(1 - abs(FILLING[label] - filling))
                masks.append(blob)
        if not boxes:
            return Detections(torch.zeros(0, 4), (), torch.zeros(0), torch.zeros(0, height, width, dtype=torch.bool))
        return Detections(torch.stack(boxes), tuple(found), torch.tensor(scores), torch.stack(masks))


def blobs(names: torch.Tensor, ground: int) -> list[torch.Tensor]:
    """(h, w) bool masks of the connected regions (by edges and corners) of (h, w) names other than `ground`'s."""
    height, width = names.shape
    found: list[torch.Tensor] = []
    for name in names.unique().tolist():
        if name == ground:
            continue
        inside = (names == name).float()[None, None]
        # every pixel starts with a number of its own and takes the largest that can be reached
        spread = inside * torch.arange(1, height * width + 1).view(1, 1, height, width)
        while not torch.equal(spread, wider := F.max_pool2d(spread, 3, 1, 1) * inside):
            spread = wider
        found += [spread[0, 0] == number for number in spread.unique().tolist() if number > 0]
    return found
