"""Video rewards that look at some frames only: which those are, and their scores without the others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from alignkit.errors import RecipeError
from alignkit.rewards.base import Evaluation, OfFrames, Reward, ScoresGroups
from alignkit.types import Prompt


def frames_at(media: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, S, 3, H, W) the frames `index` (B, S) of (B, T, 3, H, W)."""
    return media[torch.arange(len(media), device=media.device).unsqueeze(1), index]


@dataclass(frozen=True, eq=False)
class Looking:
    """A reward of some frames that is told more than the media and their prompts say.

    Attributes:
        reward: what looks.
        num_frames: the media are the first frames of videos of so many; None: they are whole.
        seeds: for each sample, what its random frames are drawn by, in the place of its prompt's id; None: by that.
    """

    reward: OfFrames
    num_frames: int | None = None
    seeds: Sequence[int] | None = None
    kind: str = "video"

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def chosen(self, num_frames: int, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B, S) as the reward's."""
        if self.seeds is not None:
            prompts = [Prompt(str(p), seed, p.columns) for p, seed in zip(prompts, self.seeds, strict=True)]
        return self.reward.chosen(num_frames, prompts)

    def of_frames(
        self, frames: torch.Tensor, index: torch.Tensor, num_frames: int, prompts: Sequence[Prompt]
    ) -> Evaluation:
        """As the reward's."""
        return self.reward.of_frames(frames, index, num_frames, prompts)

    def raw(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> Evaluation:
        """Of (B, t, 3, H, W), among whose frames are the chosen ones."""
        num_frames = media.shape[1] if self.num_frames is None else self.num_frames
        index = self.chosen(num_frames, prompts).to(media.device)
        return self.of_frames(frames_at(media, index), index, num_frames, prompts)

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) for (B, t, 3, H, W)."""
        return self.raw(media, prompts).scores


def drawn_in(key: Sequence[int | str], prompts: Sequence[Prompt]) -> list[int]:
    """A seed for each prompt, of the round `key` and the prompt's id alone."""
    digests = [hashlib.sha256(f"{tuple(key)} {prompt.id}".encode()).digest() for prompt in prompts]
    return [int.from_bytes(digest[:7]) for digest in digests]


def sparse(rewards: Mapping[str, Reward]) -> bool:
    """Whether all of these rewards that see media look at some frames only, one does, and none compares groups: a group
    may come in batches of which different first frames were decoded."""
    seeing = [reward for reward in rewards.values() if reward.kind != "latent"]
    return bool(seeing) and all(isinstance(r, OfFrames) and not isinstance(r, ScoresGroups) for r in seeing)


def frames_needed(rewards: Mapping[str, Reward], num_frames: int, prompts: Sequence[Prompt]) -> int | None:
    """How many leading frames of videos of `num_frames` these rewards look at; None: all of them."""
    if not sparse(rewards):
        return None
    looking = [reward for reward in rewards.values() if isinstance(reward, OfFrames)]
    most = max(int(reward.chosen(num_frames, prompts).max()) + 1 for reward in looking)
    return most if most < num_frames else None


def check_prefix(rewards: Mapping[str, Reward], media: torch.Tensor, needed: int, num_frames: int) -> None:
    """Raises RecipeError where (B, t, 3, H, W) are not the first `needed` frames of videos of `num_frames`."""
    if media.ndim != 5 or media.shape[1] < needed:
        raise RecipeError(
            f"media of shape {tuple(media.shape)} as the first frames of videos of {num_frames}: the rewards "
            f"{', '.join(rewards)} look at the first {needed}; decode as many, see Weighted.frames_needed"
        )
