"""What video rewards that ask an image reward about some frames have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import torch
from einops import rearrange, reduce

from alignkit.errors import RecipeError
from alignkit.rewards.base import Evaluation, Reward, ScoresGroups, evaluate
from alignkit.rewards.loading import describe
from alignkit.rewards.of_frames import frames_at
from alignkit.rewards.parts import bound, check, files_of, prepare
from alignkit.rewards.weights import Files
from alignkit.types import Prompt


class ImageFrames:
    """A dataclass with a field `reward`, that says which frames of a video are scored and what each counts."""

    name: str
    kind = "video"

    @property
    def image_reward(self) -> Reward:
        """What scores the frames."""
        raise NotImplementedError

    def chosen(self, num_frames: int, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B, S) indices of the frames that are scored."""
        raise NotImplementedError

    def shares(self, index: torch.Tensor, num_frames: int, applicable: torch.Tensor) -> torch.Tensor:
        """(B, S) what each score counts; anything for a video of which no frame is `applicable`, (B, S) bool."""
        raise NotImplementedError

    def require_images(self) -> None:
        """Raises RecipeError where the reward scores no single images."""
        inner, kind = self.image_reward, type(self).__name__
        if inner.kind != "image" or isinstance(inner, ScoresGroups):
            what = "groups" if inner.kind == "image" else f"{inner.kind} media"
            raise RecipeError(f"{kind} needs a reward of single images; {inner.name!r} scores {what}")

    @property
    def differentiable(self) -> bool:
        """As the image reward."""
        return self.image_reward.differentiable

    def files(self) -> Sequence[Files]:
        """Those of the image reward."""
        return files_of([self.image_reward])

    def prepare(self) -> None:
        """As the image reward's."""
        prepare(self.image_reward)

    def bind(self, policy: Any) -> Self:
        """The same with an image reward that has what it needs of the policy."""
        own = bound(self.image_reward, policy)
        return self if own is self.image_reward else dataclasses.replace(self, reward=own)  # type: ignore[type-var]

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """As the image reward's."""
        check(self.image_reward, prompts)

    def describe(self) -> dict[str, Any]:
        """What the frames are scored by."""
        return {"per_frame": describe(self.image_reward)}

    def raw(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> Evaluation:
        """As `of_frames`, of (B, T, 3, H, W)."""
        index = self.chosen(media.shape[1], prompts).to(media.device)
        return self.of_frames(frames_at(media, index), index, media.shape[1], prompts)

    def of_frames(
        self, frames: torch.Tensor, index: torch.Tensor, num_frames: int, prompts: Sequence[Prompt]
    ) -> Evaluation:
        """The shares times the scores of the frames to which the image reward applies; a frame that failed fails its
        video.

        Args:
            frames: (B, S, 3, H, W) in [0, 1].
            index: (B, S) where they are in videos of `num_frames`.
        """
        count = frames.shape[1]
        repeated = [prompt for prompt in prompts for _ in range(count)]
        evaluation = evaluate(self.image_reward, rearrange(frames, "b s c h w -> (b s) c h w"), repeated)
        applicable = rearrange(evaluation.applicable, "(b s) -> b s", s=count)
        scores = rearrange(evaluation.scores, "(b s) -> b s", s=count)
        shares = self.shares(index, num_frames, applicable)
        total = reduce(shares * torch.where(applicable, scores, 0.0), "b s -> b", "sum")
        applies = applicable.any(dim=1)
        return Evaluation(total.masked_fill(~applies, torch.nan), applies)

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) for (B, T, 3, H, W)."""
        return evaluate(self, media, prompts).scores
