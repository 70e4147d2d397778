"""Whether objects lie in the boxes that a prompt gives, by an object detector."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.card import Card
from alignkit.rewards.composition import check_labels, detector_of, spec_of
from alignkit.rewards.detection import tiny_detector
from alignkit.rewards.detections import Detections, DetectorCall, detect, kept
from alignkit.rewards.parts import files_of, prepare
from alignkit.rewards.weights import Files
from alignkit.types import Prompt

MODES = ("dense", "strict")
UNITS = ("fraction", "pixel")
MATCHED = 0.5  # IoU from which a box counts as hit


@dataclass(frozen=True)
class Layout:
    """The boxes of a prompt: (K, 4) left, top, right, bottom, and what is to be in each."""

    boxes: torch.Tensor
    labels: tuple[str, ...]


def layout_of(prompt: Prompt, units: str) -> Layout:
    """The layout in a prompt's column `boxes`.

    It is a list of `{"label": "cup", "box": [left, top, right, bottom]}`, or of four numbers each with a second column
    `labels` of as many names; JSON text of either will do.

    Raises:
        RewardError: names the prompt and what is wrong.
    """
    where = f"prompt {prompt.id} (its line or row in the prompt file) {str(prompt)!r}"
    entries, names = (_list(where, name, prompt.columns.get(name)) for name in ("boxes", "labels"))
    if entries and all(isinstance(one, Mapping) and {"label", "box"} <= set(one) for one in entries):
        names, entries = [one["label"] for one in entries], [one["box"] for one in entries]
    if not entries or len(names) != len(entries):
        raise RewardError(
            f"{where} has {len(entries)} boxes and {len(names)} labels; expected a column `boxes` such as "
            '[{"label": "cup", "box": [0.1, 0.2, 0.5, 0.9]}], or lists `boxes` and `labels` of one length'
        )
    for box in entries:
        number = isinstance(box, (list, tuple)) and len(box) == 4 and all(isinstance(x, (int, float)) for x in box)
        if not number or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
            raise RewardError(
                f"{where} has the box {box!r}; expected [left, top, right, bottom], each side longer than 0"
            )
        if units == "fraction" and max(box) > 1:
            raise RewardError(
                f"{where} has the box {box!r}, which is no fraction of the image; choose units='pixel' if that is meant"
            )
    return Layout(torch.tensor(entries, dtype=torch.float32), tuple(map(str, names)))


def _list(where: str, column: str, value: Any) -> list[Any]:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise RewardError(f"{where}: column {column!r} is no JSON: {error}") from error
    if not isinstance(value, (list, tuple, type(None))):
        raise RewardError(f"{where}: column {column!r} holds {value!r}; expected a list")
    return list(value or [])


def assignment(gain: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """The pairs (row, column) with the largest sum of gains, each row and column at most once; by Kuhn and Munkres.

    Rows are added one by one; each is matched along the path of least cost, found as Dijkstra does with potentials.
    """
    if not gain or not gain[0]:
        return []
    if len(gain) > len(gain[0]):
        return sorted((row, column) for column, row in assignment(list(zip(*gain, strict=True))))
    columns = len(gain[0])
    of_row, of_column = [0.0] * len(gain), [0.0] * (columns + 1)
    owner: list[int | None] = [None] * (columns + 1)  # the last place stands for the row that is being added
    for row in range(len(gain)):
        owner[columns] = row
        here, reached = columns, [False] * (columns + 1)
        cost, before = [float("inf")] * columns, [columns] * columns
        while (current := owner[here]) is not None:
            reached[here] = True
            free = [column for column in range(columns) if not reached[column]]
            for column in free:
                reduced = -gain[current][column] - of_row[current] - of_column[column]
                if reduced < cost[column]:
                    cost[column], before[column] = reduced, here
            nearest = min(free, key=lambda column: cost[column])
            step = cost[nearest]
            for column in range(columns + 1):
                matched = owner[column]
                if reached[column] and matched is not None:
                    of_row[matched] += step
                    of_column[column] -= step
                elif column < columns:
                    cost[column] -= step
            here = nearest
        while here != columns:
            owner[here], here = owner[before[here]], before[here]
    return sorted((row, column) for column, row in enumerate(owner[:columns]) if row is not None)


def layout_ious(wanted: Layout, found: Detections) -> list[float]:
    """The IoU of each matched pair of a wanted and a found box of one label, by the best assignment; none are 0."""
    from torchvision.ops import box_iou

    same = torch.tensor([[own == other for other in found.labels] for own in wanted.labels], dtype=torch.bool)
    overlaps = box_iou(wanted.boxes, found.boxes) * same.view(len(wanted.labels), len(found.labels))
    return [iou for row, column in assignment(overlaps.tolist()) if (iou := overlaps[row, column].item()) > 0]


@dataclass(frozen=True, eq=False)
class BoxIoU:
    """How well the objects that are found lie in the boxes that the prompt gives.

    Wanted and found boxes of one label are matched one to one with the largest sum of IoUs. That sum is divided by the
    number of wanted or of found boxes, whichever is larger: a missing object costs as much as one too many, so covering
    the image with objects does not pay.

    Attributes:
        detector, query: see `composition.GenEval`.
        mode: "dense": the mean IoU as above. "strict": 1 where every box is hit with an IoU of at least 0.5 and there
            is no object of these labels besides, else 0.
        units: of the boxes in the prompts, "fraction" of width and height, or "pixel".
        threshold, per_label, overlap: which detections count, see `detections.kept`.
    """

    detector: str | DetectorCall = "PekingU/rtdetr_r50vd_coco_o365"
    mode: str = "dense"
    units: str = "fraction"
    threshold: float = 0.3
    per_label: int = 16
    overlap: float = 1.0
    query: str = "{}"
    name: str = "box_iou"
    kind: ClassVar[str] = "image"
    differentiable: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        family="composition",
        summary="its objects lie in the boxes of the prompt, and there are no others",
        range="[0, 1]; 0 or 1 if mode='strict'",
        licence="Apache-2.0",
        cost="43 M parameters (RT-DETR R50), 0.2 GB",
        columns=("boxes", "labels?"),
        source="IoU with one-to-one matching as in DETR (arXiv 2005.12872); over-detection as in VLM-R1 (2504.07615)",
    )

    def __post_init__(self) -> None:
        for option, value, known in (("mode", self.mode, MODES), ("units", self.units, UNITS)):
            if value not in known:
                raise RecipeError(f"reward {self.name!r}: {option}={value!r}; choose one of {', '.join(known)}")

    @cached_property
    def finder(self) -> DetectorCall:
        """The detector."""
        return detector_of(self.detector, self.threshold, self.query)

    def files(self) -> tuple[Files, ...]:
        """Those of the detector."""
        return files_of([self.finder])

    def prepare(self) -> None:
        """Read the weights."""
        prepare(self.finder)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError naming the first prompt without usable boxes, or with a label that cannot be found."""
        for prompt in prompts:
            check_labels(self.finder, list(dict.fromkeys(layout_of(prompt, self.units).labels)), prompt)

    @torch.no_grad()
    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) in [0, 1] for (B, 3, H, W).

        Raises:
            RewardError: a prompt's boxes cannot be read, or the detector does not know a label.
        """
        if not len(media):
            return torch.zeros(0)
        height, width = media.shape[-2:]
        scale = torch.tensor([width, height, width, height]) if self.units == "pixel" else torch.ones(4)
        layouts = [layout_of(prompt, self.units) for prompt in prompts]
        found = detect(self.finder, media, [list(dict.fromkeys(layout.labels)) for layout in layouts])
        counted = [kept(one, self.threshold, self.per_label, self.overlap) for one in found]
        wanted = [Layout(layout.boxes / scale, layout.labels) for layout in layouts]
        return torch.tensor([self._score(*pair) for pair in zip(wanted, counted, strict=True)])

    def _score(self, wanted: Layout, found: Detections) -> float:
        ious, most = layout_ious(wanted, found), max(len(wanted.labels), len(found.labels))
        if self.mode == "strict":
            return float(sum(iou >= MATCHED for iou in ious) == most)
        return sum(ious) / most

    def describe(self) -> dict[str, Any]:
        """What detects."""
        return {"detector": spec_of(self.finder, self.detector)}

    @classmethod
    def tiny(cls, folder: Path) -> Mapping[str, Any]:
        """Random weights of a tiny YOLOS that knows persons, dogs and cups."""
        return {"detector": str(tiny_detector(folder))}
