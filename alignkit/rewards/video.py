"""Video rewards without weights of their own: an image reward on a few frames, and statistics of motion."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, reduce

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.base import Reward
from alignkit.rewards.card import Card
from alignkit.rewards.frames import middles, one_per_segment
from alignkit.rewards.image_frames import ImageFrames
from alignkit.rewards.loading import load
from alignkit.rewards.optical_flow import optical_flow
from alignkit.rewards.pixels import luminance
from alignkit.types import Prompt


def temporal_attenuation(frames: torch.Tensor, num_frames: int, strength: float) -> torch.Tensor:
    """exp(-strength * |frame - num_frames / 2|), the weight of a frame's score (TAR of InstructVideo, 2312.12490).

    Distances are in frames: with strength 1 the neighbours of the centre weigh 0.37 and the border of 16 frames
    3e-4, so that all but the centre is hardly rewarded. The paper found 0.5 to destabilise and 2 to starve the rest.

    Args:
        frames: indices from 0, of any shape.
    """
    return torch.exp(-strength * (frames - num_frames / 2).abs())


@dataclass(frozen=True, eq=False)
class Segmental(ImageFrames):
    """An image reward on one frame of each segment of a video, less the farther from the centre.

    An image reward on every frame drives a generator to still pictures; sparse and attenuated scores do not
    (InstructVideo's SegVR and TAR, arXiv 2312.12490). Only the chosen frames go through the image reward. Which ones
    depends on the prompt's id and `seed` alone, and while a run samples on its round: all samples of a group are judged
    by the same frames, in every round by others. Held-out prompts keep theirs.

    Attributes:
        reward: the image reward, a spec or a reward.
        segments: in how many equal parts the video is cut.
        attenuation: strength of `temporal_attenuation`; 0 weighs the frames alike.
        frames: "random" frame of each segment, or its "middle", for evaluation.
        seed: of the random frames.
        normalised: the weights sum to 1, so that scores are on the image reward's scale. This is not the paper's
            reward: of one segment all frames then weigh alike, and of several a draw far from the centre counts as
            much as one near it. False is the published mean of attenuated scores, sum_i f_i r_i / segments.
    """

    reward: str | Callable[..., Any] = "pickscore"
    segments: int = 4
    attenuation: float = 1.0
    frames: str = "random"
    seed: int = 0
    normalised: bool = True
    name: str = "segmental"

    card: ClassVar[Card] = Card(
        family="video",
        summary="one frame of each segment scores high with an image reward, the centre most",
        range="that of the image reward",
        licence="that of the image reward",
        cost="that of the image reward, once per segment",
        source="InstructVideo, 2312.12490",
    )

    def __post_init__(self) -> None:
        if self.frames not in ("random", "middle"):
            raise RecipeError(f"frames={self.frames!r}; choose 'random' or 'middle' (of each segment)")
        if self.segments < 1 or self.attenuation < 0:
            raise RecipeError(
                f"segments={self.segments}, attenuation={self.attenuation}; expected at least 1 and at least 0"
            )
        self.require_images()

    @cached_property
    def image_reward(self) -> Reward:
        """What scores the frames."""
        return load(self.reward)

    def chosen(self, num_frames: int, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B, segments) indices of the frames that are scored."""
        if self.frames == "middle":
            return torch.tensor([middles(num_frames, self.segments)]).repeat(len(prompts), 1)
        picked = [one_per_segment(num_frames, self.segments, self._generator(prompt)) for prompt in prompts]
        return torch.tensor(picked, dtype=torch.long).reshape(len(prompts), self.segments)

    def _generator(self, prompt: Prompt) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {prompt.id}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7]))

    def shares(self, index: torch.Tensor, num_frames: int, applicable: torch.Tensor) -> torch.Tensor:
        """(B, segments) attenuated shares of the mean; normalised they sum to 1 however far from the centre all are."""
        if self.normalised:
            distance = (index - num_frames / 2).abs().masked_fill(~applicable, torch.inf)
            nearest = distance.amin(dim=1, keepdim=True)
            weights = torch.exp(-self.attenuation * (distance - nearest)).masked_fill(~applicable, 0.0)
            return weights / weights.sum(dim=1, keepdim=True)
        weights = temporal_attenuation(index, num_frames, self.attenuation) * applicable
        return weights / applicable.sum(dim=1, keepdim=True)


def frame_difference(media: torch.Tensor) -> torch.Tensor:
    """(B,) mean absolute change of a pixel from one frame to the next, in [0, 1], of (B, T, 3, H, W)."""
    _at_least(2, media, "a difference of frames")
    return reduce((media[:, 1:] - media[:, :-1]).abs(), "b t c h w -> b", "mean")


def flows(media: torch.Tensor, side: int) -> torch.Tensor:
    """(B, T - 1, 2, h, w) motion between neighbouring frames of (B, T, 3, H, W), in pixels of the video, x then y.

    Args:
        side: the shorter side of the frames is made at most this long before, to save time.
    """
    _at_least(2, media, "optical flow")
    grey = rearrange(luminance(media), "b t h w -> (b t) 1 h w")
    scale = min(1.0, side / min(grey.shape[-2:]))
    if scale < 1:
        size = [round(length * scale) for length in grey.shape[-2:]]
        grey = F.interpolate(grey, size=size, mode="bilinear", antialias=True, align_corners=False)
    frames = rearrange(grey, "(b t) c h w -> b t c h w", t=media.shape[1])
    first, second = (rearrange(part, "b t c h w -> (b t) c h w") for part in (frames[:, :-1], frames[:, 1:]))
    return rearrange(optical_flow(first, second), "(b t) c h w -> b t c h w", t=media.shape[1] - 1) / scale


def flow_magnitude(flow: torch.Tensor) -> torch.Tensor:
    """(B,) mean length of (B, T, 2, h, w) flow, in pixels per frame."""
    return reduce(torch.linalg.vector_norm(flow, dim=2), "b t h w -> b", "mean")


def motion_smoothness(flow: torch.Tensor) -> torch.Tensor:
    """(B,) minus the mean length of the change of (B, T, 2, h, w) flow from one frame to the next, at most 0."""
    return -flow_magnitude(flow[:, 1:] - flow[:, :-1])


def _at_least(count: int, media: torch.Tensor, what: str) -> None:
    if media.shape[1] < count:
        raise RewardError(f"{what} needs a video of at least {count} frames; given {media.shape[1]}")


@dataclass(frozen=True, eq=False)
class FrameDifference:
    """How much pixels change from one frame to the next. A still video scores 0, shuffled frames score high."""

    name: str = "frame_difference"

    kind = "video"
    differentiable = True
    card: ClassVar[Card] = Card(
        family="video",
        summary="pixels change from frame to frame, whether by motion or by flicker",
        range="[0, 1]",
        cost="a subtraction",
    )

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) in [0, 1]."""
        return frame_difference(media)


@dataclass(frozen=True, eq=False)
class FlowMagnitude:
    """How fast things move: the mean length of the optical flow, in pixels per frame. A still video scores 0.

    Ground without texture counts as still, so it compares videos of like content.

    Attributes:
        side: frames are made at most this long on their shorter side before.
    """

    side: int = 128
    name: str = "flow_magnitude"

    kind = "video"
    differentiable = True
    card: ClassVar[Card] = Card(
        family="video",
        summary="things move, whatever the prompt says",
        range="at least 0, pixels per frame",
        cost="about 0.1 s per pair of frames at side=128 on one core",
        source="Lucas and Kanade's flow on a pyramid",
    )

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) in pixels per frame."""
        return flow_magnitude(flows(media, self.side))


@dataclass(frozen=True, eq=False)
class MotionSmoothness:
    """How little motion changes from one frame to the next: minus the mean change of the flow, pixels per frame^2.

    Steady motion and a still video score about 0, jitter and cuts below; beside it a reward for motion is needed.

    Attributes:
        side: as of `FlowMagnitude`.
    """

    side: int = 128
    name: str = "motion_smoothness"

    kind = "video"
    differentiable = True
    card: ClassVar[Card] = Card(
        family="video",
        summary="motion is steady: no jitter, no cuts",
        range="at most 0, minus pixels per frame^2",
        cost="about 0.1 s per pair of frames at side=128 on one core",
        source="Lucas and Kanade's flow on a pyramid",
    )

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) at most 0."""
        _at_least(3, media, "the change of motion")
        return motion_smoothness(flows(media, self.side))
