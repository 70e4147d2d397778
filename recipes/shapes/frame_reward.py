"""A frame reward that a still shape in the middle satisfies best: what image rewards are to videos.

It says nothing of motion, so what happens to motion under it is what the method does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce, repeat

from alignkit.rewards.loading import load_file
from alignkit.shipped import path
from alignkit.types import Prompt

world = load_file(path("recipes", "shapes", "world.py"))

TOLERANCE = 0.3
"""How far a colour may be from the named one, in [0, 1] a channel, to match by exp(-1/2)."""


@dataclass(frozen=True, eq=False)
class Centred:
    """The colour that the prompt names, in the middle of the frame and not elsewhere, in [-1, 1].

    Attributes:
        radius: of the middle, as a share of the frame's height: the standard deviation of its weight.
    """

    radius: float = 0.16
    name: str = "centred"
    kind: str = "image"
    differentiable: bool = True

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) of (B, 3, H, W): the mean match of colour in the middle, less that outside."""
        named = [world.COLOURS[world.parse(str(prompt))[0]] for prompt in prompts]
        colours = torch.tensor(named, device=media.device) / 255
        apart = reduce((media - rearrange(colours, "b c -> b c 1 1")) ** 2, "b c h w -> b h w", "mean")
        match = torch.exp(-apart / (2 * TOLERANCE**2))
        inside = self.middle(media)
        outside = 1 - inside / inside.max()
        return reduce(match * (inside / inside.sum() - outside / outside.sum()), "b h w -> b", "sum")

    def middle(self, media: torch.Tensor) -> torch.Tensor:
        """(H, W) weights, largest in the middle of frames (..., H, W)."""
        height, width = media.shape[-2:]
        y, x = (torch.arange(n, device=media.device) - (n - 1) / 2 for n in (height, width))
        squares = repeat(y**2, "h -> h w", w=width) + x**2
        return torch.exp(-squares / (2 * (self.radius * height) ** 2))
