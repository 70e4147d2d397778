"""An image reward on every frame of a video, or on every nth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from alignkit.errors import RecipeError
from alignkit.rewards.base import Reward
from alignkit.rewards.card import Card
from alignkit.rewards.frames import every_nth
from alignkit.rewards.image_frames import ImageFrames
from alignkit.rewards.loading import load
from alignkit.types import Prompt


@dataclass(frozen=True, eq=False)
class PerFrameMean(ImageFrames):
    """An image reward as a video reward: its mean over the frames to which it applies.

    Attributes:
        reward: spec or callable of a reward of single images.
        nth: only frames 0, nth, 2 nth, ... are scored.
        name: "" makes it the image reward's name and `_per_frame`.
    """

    reward: Any
    name: str = ""
    nth: int = 1

    card: ClassVar[Card] = Card(
        family="video",
        summary="the frames score high with an image reward; it says nothing of motion",
        range="that of the image reward",
        cost="that of the image reward, once per frame",
    )

    def __post_init__(self) -> None:
        loaded = load(self.reward)
        object.__setattr__(self, "reward", loaded)
        object.__setattr__(self, "name", self.name or f"{loaded.name}_per_frame")
        self.require_images()
        if self.nth < 1:
            raise RecipeError(f"nth={self.nth}; expected at least 1, which scores every frame")

    @property
    def image_reward(self) -> Reward:
        """What scores the frames."""
        return self.reward

    def chosen(self, num_frames: int, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B, S) indices of the frames that are scored."""
        return torch.tensor([every_nth(num_frames, self.nth)]).repeat(len(prompts), 1)

    def shares(self, index: torch.Tensor, num_frames: int, applicable: torch.Tensor) -> torch.Tensor:
        """(B, S) the same for all."""
        return applicable / applicable.sum(dim=1, keepdim=True)
