"""Plain statistics of images that tell reward hacking from improvement: one (B,) number each, no model.

All take (B, 3, H, W) or (B, T, 3, H, W), float in [0, 1]; a video's number is the mean over its frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, reduce

from alignkit.rewards.card import Card
from alignkit.rewards.pixels import luminance
from alignkit.types import Prompt

DARK = 0.1  # luminance below this is a dark pixel
SATURATED = 0.9  # HSV saturation above this, in a pixel that is not dark
EDGE = 0.1  # Sobel magnitude above this: a tenth of the step from black to white
BINS = 8  # per channel, 512 colours in all


def brightness(media: torch.Tensor) -> torch.Tensor:
    """(B,) mean luminance, in [0, 1]; differentiable."""
    return _over_frames(media, lambda x: luminance(x).mean(dim=(-2, -1)))


def contrast(media: torch.Tensor) -> torch.Tensor:
    """(B,) standard deviation of the luminance, in [0, 0.5]; differentiable except on uniform images."""
    return _over_frames(media, lambda x: luminance(x).flatten(1).std(dim=1, correction=0))


def dark_fraction(media: torch.Tensor) -> torch.Tensor:
    """(B,) share of pixels with luminance below `DARK`, in [0, 1]."""
    return _over_frames(media, lambda x: (luminance(x) < DARK).float().mean(dim=(-2, -1)))


def saturated_fraction(media: torch.Tensor) -> torch.Tensor:
    """(B,) share of pixels with HSV saturation above `SATURATED` that are not dark, in [0, 1]."""

    def share(x: torch.Tensor) -> torch.Tensor:
        high, low = x.amax(dim=1), x.amin(dim=1)
        saturated = (high - low) > SATURATED * high
        return (saturated & (luminance(x) >= DARK)).float().mean(dim=(-2, -1))

    return _over_frames(media, share)


def edge_density(media: torch.Tensor) -> torch.Tensor:
    """(B,) share of pixels with a Sobel gradient above `EDGE`, in [0, 1]. A step from 0 to 1 has gradient 1."""

    def share(x: torch.Tensor) -> torch.Tensor:
        sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], device=x.device) / 4
        kernels = rearrange([sobel, sobel.T], "k h w -> k 1 h w")
        padded = F.pad(rearrange(luminance(x), "b h w -> b 1 h w"), (1, 1, 1, 1), mode="replicate")
        gradient = F.conv2d(padded, kernels).pow(2).sum(dim=1).sqrt()
        return (gradient > EDGE).float().mean(dim=(-2, -1))

    return _over_frames(media, share)


def colour_entropy(media: torch.Tensor) -> torch.Tensor:
    """(B,) entropy in bits of the histogram over `BINS`**3 colours, in [0, 9]; 0 is one flat colour."""

    def entropy(x: torch.Tensor) -> torch.Tensor:
        bins = (x.clamp(0, 1) * BINS).long().clamp(max=BINS - 1)
        index = (bins[:, 0] * BINS + bins[:, 1]) * BINS + bins[:, 2]  # (B, H, W)
        counts = torch.stack([torch.bincount(one.flatten(), minlength=BINS**3) for one in index])
        share = counts.float() / counts.sum(dim=1, keepdim=True)
        return -torch.xlogy(share, share).sum(dim=1) / torch.log(torch.tensor(2.0))

    return _over_frames(media, entropy)


STATISTICS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "brightness": brightness,
    "contrast": contrast,
    "dark_fraction": dark_fraction,
    "saturated_fraction": saturated_fraction,
    "edge_density": edge_density,
    "colour_entropy": colour_entropy,
}


def image_statistics(media: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every statistic of `STATISTICS`, (B,) each."""
    return {name: statistic(media) for name, statistic in STATISTICS.items()}


def _over_frames(media: torch.Tensor, statistic: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    if media.ndim == 4:
        return statistic(media.float())
    frames = rearrange(media.float(), "b t c h w -> (b t) c h w")
    return reduce(statistic(frames), "(b t) -> b", "mean", t=media.shape[1])


class Brightness:
    """Mean luminance, in [0, 1]: a differentiable reward that needs no model, for trying a recipe out."""

    name = "brightness"
    kind = "image"
    differentiable = True
    card: ClassVar[Card] = Card(
        family="statistics",
        summary="the picture is bright: its mean luminance",
        range="[0, 1]",
        cost="a mean",
    )

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,)."""
        return brightness(media)
