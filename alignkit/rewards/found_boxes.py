"""Boxes around what a detector finds, as the regions of a self-reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.composition import detector_of
from alignkit.rewards.detections import DetectorCall, detect
from alignkit.rewards.parts import files_of, prepare
from alignkit.rewards.weights import Files
from alignkit.types import Prompt


@dataclass(frozen=True, eq=False)
class FoundBoxes:
    """The largest boxes of the objects that a detector finds in each picture (SRUM, 2510.12784, takes ten).

    As `detector` of `understanding.SelfReward`. A picture in which nothing is found has no region, and is judged as a
    whole alone.

    Attributes:
        detector, query: see `composition.GenEval`.
        labels: what is looked for; (): the names in the prompt's column `labels`.
        threshold: of the detector's scores.
        most: boxes of one picture.
    """

    detector: str | DetectorCall = "PekingU/rtdetr_r50vd_coco_o365"
    labels: tuple[str, ...] = ()
    threshold: float = 0.3
    most: int = 10
    query: str = "{}"

    def __post_init__(self) -> None:
        if self.most < 1 or isinstance(self.labels, str):
            raise RecipeError(f"most={self.most}, labels={self.labels!r}; expected at least 1, and a tuple of names")

    @cached_property
    def finder(self) -> DetectorCall:
        """The detector."""
        return detector_of(self.detector, self.threshold, self.query)

    def files(self) -> tuple[Files, ...]:
        """Those of the detector."""
        return files_of([self.finder])

    def prepare(self) -> None:
        """Read the detector's weights."""
        prepare(self.finder)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError naming the first prompt that does not say what to look for."""
        for prompt in prompts:
            self._labels(prompt)

    def _labels(self, prompt: Prompt) -> list[str]:
        found = self.labels or prompt.columns.get("labels")
        if not found or isinstance(found, str):
            raise RewardError(
                f"prompt {prompt.id} (its line or row in the prompt file) {str(prompt)!r} does not say what to look "
                "for; give it a column `labels`, a list of names, or the detector the option labels=('dog', 'cup')"
            )
        return list(dict.fromkeys(map(str, found)))

    @torch.no_grad()
    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        """For each of (B, 3, H, W) in [0, 1] (N, 4) left, top, right, bottom in fractions, largest first."""
        found = detect(self.finder, media, [self._labels(prompt) for prompt in prompts])
        return [largest(one.boxes[one.scores > self.threshold], self.most) for one in found]


def largest(boxes: torch.Tensor, most: int) -> torch.Tensor:
    """The `most` boxes of (N, 4) with the largest areas; those without any area are left out."""
    sides = boxes[:, 2:] - boxes[:, :2]
    solid = (sides > 0).all(dim=1)
    order = sides[solid].prod(dim=1).argsort(descending=True, stable=True)
    return boxes[solid][order[:most]]
