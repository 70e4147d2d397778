"""Objects in images: what a detector returns, and which of it counts.

A detector is any callable `(media, labels) -> list[Detections]`: (B, 3, H, W) in [0, 1] and, for each image, the labels
to look for. It returns only boxes with these labels, spelt as they were asked for. `detection.Detector` is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from alignkit.errors import RewardError


@dataclass(frozen=True)
class Detections:
    """What was found in one image.

    Attributes:
        boxes: (N, 4) left, top, right, bottom as fractions of width and height, in [0, 1].
        labels: N names.
        scores: (N,) confidences in [0, 1].
        masks: (N, H, W) bool, or None where the detector gives boxes only.
    """

    boxes: torch.Tensor
    labels: tuple[str, ...]
    scores: torch.Tensor
    masks: torch.Tensor | None = None

    def __post_init__(self) -> None:
        number = len(self.labels)
        right = tuple(self.boxes.shape) == (number, 4) and tuple(self.scores.shape) == (number,)
        if not right or (self.masks is not None and len(self.masks) != number):
            raise RewardError(
                f"detections have {number} labels, boxes {tuple(self.boxes.shape)}, scores {tuple(self.scores.shape)}; "
                "expected N labels, (N, 4) and (N,)"
            )
        if number and (self.boxes.min() < -1e-4 or self.boxes.max() > 1 + 1e-4):
            raise RewardError(
                f"detections have box coordinates from {self.boxes.min():.3g} to {self.boxes.max():.3g}; expected "
                "fractions of width and height, in [0, 1]"
            )

    def __getitem__(self, rows: list[int]) -> Detections:
        """Some of them, in that order."""
        masks = None if self.masks is None else self.masks[rows]
        return Detections(self.boxes[rows], tuple(self.labels[row] for row in rows), self.scores[rows], masks)


DetectorCall = Callable[[torch.Tensor, Sequence[Sequence[str]]], Sequence[Detections]]


@runtime_checkable
class ChecksLabels(Protocol):
    """A detector that knows which labels it can find."""

    def check_labels(self, labels: Sequence[str]) -> None:
        """Raises RewardError naming the first label that it cannot find, with the nearest one that it can."""
        ...


def detect(detector: DetectorCall, media: torch.Tensor, labels: Sequence[Sequence[str]]) -> list[Detections]:
    """What a detector finds, on the CPU, checked: one answer per image and no label that was not asked for.

    Raises:
        RewardError: the detector broke its contract.
    """
    found = list(detector(media, labels))
    if len(found) != len(media):
        raise RewardError(f"the detector answered for {len(found)} images and was given {len(media)}")
    for one, wanted in zip(found, labels, strict=True):
        if not set(one.labels) <= set(wanted):
            raise RewardError(
                f"the detector found {sorted(set(one.labels) - set(wanted))} where {list(wanted)} was asked for; "
                "labels are returned as they were asked for"
            )
    return [
        Detections(d.boxes.cpu(), d.labels, d.scores.cpu(), None if d.masks is None else d.masks.cpu()) for d in found
    ]


def kept(found: Detections, threshold: float, per_label: int = 16, overlap: float = 1.0) -> Detections:
    """The detections that count, best first: GenEval's rule (Ghosh et al., arXiv 2310.11513).

    Args:
        threshold: scores must be above it.
        per_label: at most so many of each label.
        overlap: of two boxes of one label with a larger IoU the weaker one goes; 1 keeps all, as GenEval does.
    """
    from torchvision.ops import box_iou

    overlaps = box_iou(found.boxes, found.boxes) if overlap < 1 else None
    rows: list[int] = []
    for row in found.scores.argsort(descending=True, stable=True).tolist():
        same = [other for other in rows if found.labels[other] == found.labels[row]]
        covered = overlaps is not None and any(overlaps[row, other] > overlap for other in same)
        if found.scores[row] > threshold and len(same) < per_label and not covered:
            rows.append(row)
    return found[rows]
