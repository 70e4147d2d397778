"""Video rewards that look at some frames only: which those are, and their scores without the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from alignkit.errors import RecipeError
from alignkit.rewards.base import Evaluation, OfFrames, Reward
from alignkit.types import Prompt


def frames_at(media: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, S, 3, H, W) the frames `index` (B, S) of (B, T, 3, H, W)."""
    return media[torch.arange(len(media), device=media.device).unsqueeze(1), index]


@dataclass(frozen=True, eq=False)
class OfPrefix:
    """A reward of some frames as a reward of the first frames of videos of `num_frames`."""

    reward: OfFrames
    num_frames: int
    kind: str = "video"

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def raw(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> Evaluation:
        """Of (B, t, 3, H, W), the first t frames, among which are the chosen ones."""
        index = self.reward.chosen(self.num_frames, prompts).to(media.device)
        return self.reward.of_frames(frames_at(media, index), index, self.num_frames, prompts)

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) for (B, t, 3, H, W)."""
        return self.raw(media, prompts).scores


def sparse(rewards: Mapping[str, Reward]) -> bool:
    """Whether all of these rewards that see media look at some frames only, and one does."""
    seeing = [reward for reward in rewards.values() if reward.kind != "latent"]
    return bool(seeing) and all(isinstance(reward, OfFrames) for reward in seeing)


def frames_needed(rewards: Mapping[str, Reward], num_frames: int, prompts: Sequence[Prompt]) -> int | None:
    """How many leading frames of videos of `num_frames` these rewards look at; None: all of them."""
    if not sparse(rewards):
        return None
    looking = [reward for reward in rewards.values() if isinstance(reward, OfFrames)]
    most = max(int(reward.chosen(num_frames, prompts).max()) + 1 for reward in looking)
    return most if most < num_frames else None


def check_prefix(
    rewards: Mapping[str, Reward], media: torch.Tensor, prompts: Sequence[Prompt], num_frames: int
) -> None:
    """Raises RecipeError where (B, t, 3, H, W) are too few of the first frames of videos of `num_frames`."""
    needed = frames_needed(rewards, num_frames, prompts) or num_frames
    if media.ndim != 5 or media.shape[1] < needed:
        raise RecipeError(
            f"media of shape {tuple(media.shape)} as the first frames of videos of {num_frames}: the rewards "
            f"{', '.join(rewards)} look at the first {needed}; decode as many, see Weighted.frames_needed"
        )
