"""An image reward on every frame of a video, or on every nth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from einops import rearrange, reduce

from alignkit.errors import RecipeError
from alignkit.rewards.base import Evaluation, ScoresGroups, evaluate
from alignkit.rewards.card import Card
from alignkit.rewards.frames import every_nth
from alignkit.rewards.loading import describe, load
from alignkit.rewards.parts import bound, check, files_of, prepare
from alignkit.rewards.weights import Files
from alignkit.types import Prompt


@dataclass(frozen=True, eq=False)
class PerFrameMean:
    """An image reward as a video reward: its mean over the frames to which it applies.

    Attributes:
        reward: spec or callable of a reward of single images.
        nth: only frames 0, nth, 2 nth, ... are scored.
        name: "" makes it the image reward's name and `_per_frame`.
    """

    reward: Any
    name: str = ""
    nth: int = 1

    kind = "video"
    card: ClassVar[Card] = Card(
        family="video",
        summary="the frames score high with an image reward; it says nothing of motion",
        range="that of the image reward",
        cost="that of the image reward, once per frame",
    )

    def __post_init__(self) -> None:
        loaded = load(self.reward)
        if loaded.kind != "image" or isinstance(loaded, ScoresGroups):
            raise RecipeError(
                f"PerFrameMean needs a reward of single images; {loaded.name!r} scores "
                + ("groups" if loaded.kind == "image" else f"{loaded.kind} media")
            )
        if self.nth < 1:
            raise RecipeError(f"nth={self.nth}; expected at least 1, which scores every frame")
        object.__setattr__(self, "reward", loaded)
        object.__setattr__(self, "name", self.name or f"{loaded.name}_per_frame")

    @property
    def differentiable(self) -> bool:
        """As the image reward."""
        return self.reward.differentiable

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """As the image reward's."""
        check(self.reward, prompts)

    def files(self) -> tuple[Files, ...]:
        """As the image reward's."""
        return files_of([self.reward])

    def prepare(self) -> None:
        """As the image reward's."""
        prepare(self.reward)

    def bind(self, policy: Any) -> PerFrameMean:
        """The mean of the bound image reward."""
        own = bound(self.reward, policy)
        return self if own is self.reward else replace(self, reward=own)

    def describe(self) -> dict[str, Any]:
        """What the frames are scored by."""
        return {"per_frame": describe(self.reward)}

    def raw(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> Evaluation:
        """As `of_frames`, of (B, T, 3, H, W)."""
        index = self.chosen(media.shape[1], prompts).to(media.device)
        return self.of_frames(media[:, :: self.nth], index, media.shape[1], prompts)

    def chosen(self, num_frames: int, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B, S) indices of the frames that are scored."""
        return torch.tensor([every_nth(num_frames, self.nth)]).repeat(len(prompts), 1)

    def of_frames(
        self, frames: torch.Tensor, index: torch.Tensor, num_frames: int, prompts: Sequence[Prompt]
    ) -> Evaluation:
        """The mean of the scores of (B, S, 3, H, W) frames; a frame that failed makes its video fail."""
        repeated = [prompt for prompt in prompts for _ in range(frames.shape[1])]
        evaluation = evaluate(self.reward, rearrange(frames, "b s c h w -> (b s) c h w"), repeated)
        applicable = rearrange(evaluation.applicable, "(b s) -> b s", s=frames.shape[1])
        scores = rearrange(evaluation.scores, "(b s) -> b s", s=frames.shape[1])
        total = reduce(torch.where(applicable, scores, 0.0), "b s -> b", "sum")
        return Evaluation(total / applicable.sum(dim=1), applicable.any(dim=1))

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) for (B, T, 3, H, W)."""
        return evaluate(self, media, prompts).scores
