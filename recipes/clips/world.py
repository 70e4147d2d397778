"""A world of clips in which everything is known: Gaussian clips of 16 frames of 8 x 8 that move as an AR(1) process.

A prompt names a picture; a clip is that picture plus a pattern, smooth in space, that decays by `MEMORY` from frame to
frame and is renewed. The density is Gaussian with covariance (time) x (space), so rectified flow has its exact velocity
in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor

FRAMES, SIDE = 16, 8
MEMORY = 0.9
"""Correlation of a pixel with itself one frame later."""
LENGTH = 2.0
"""Of the patterns, in pixels."""
PROMPTS = ("a slope", "a stripe", "a corner", "a ring")
"""The first is trained on; of the others it is measured what training did to them."""


def pictures() -> Tensor:
    """(4, 64) what the prompts name: zero mean, root mean square 1."""
    axis = (torch.arange(SIDE) - (SIDE - 1) / 2) / SIDE
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    drawn = (x, torch.cos(2 * math.pi * y), -(x.clamp_min(-0.1) * y.clamp_min(-0.1)), (x**2 + y**2).sqrt())
    flat = torch.stack([rearrange(picture, "h w -> (h w)") for picture in drawn])
    flat = flat - flat.mean(dim=1, keepdim=True)
    return flat / flat.square().mean(dim=1, keepdim=True).sqrt()


def wanted() -> Tensor:
    """(64,) the picture that the frame reward is about: a spot, which no prompt names."""
    axis = torch.arange(SIDE) - (SIDE - 1) / 2
    spot = torch.exp(-(axis[:, None].square() + axis.square()) / (2 * LENGTH**2))
    spot = rearrange(spot, "h w -> (h w)")
    return (spot - spot.mean()) / spot.std()


@dataclass(frozen=True)
class Clips:
    """The density of clips (B, 16, 64) given a prompt.

    Attributes:
        memory: correlation of a pixel one frame later, in [0, 1).
        length: of the patterns in pixels.
    """

    memory: float = MEMORY
    length: float = LENGTH

    @cached_property
    def _time(self) -> tuple[Tensor, Tensor]:
        steps = torch.arange(FRAMES, dtype=torch.float64)
        return torch.linalg.eigh(self.memory ** (steps[:, None] - steps).abs())

    @cached_property
    def _space(self) -> tuple[Tensor, Tensor]:
        axis = torch.arange(SIDE, dtype=torch.float64)
        points = torch.cartesian_prod(axis, axis)
        return torch.linalg.eigh(torch.exp(-torch.cdist(points, points).square() / (2 * self.length**2)))

    def spectrum(self, like: Tensor) -> Tensor:
        """(16, 64) variances along the axes of `turned`."""
        values = self._time[0].clamp_min(0)[:, None] * self._space[0].clamp_min(0)
        return values.to(like)

    def turned(self, x: Tensor, back: bool = False) -> Tensor:
        """Clips (B, 16, 64) in the axes along which they are independent; `back` undoes it."""
        time, space = (basis.to(x) for basis in (self._time[1], self._space[1]))
        if back:
            return einsum(x, time, space, "b i j, t i, p j -> b t p")
        return einsum(x, time, space, "b t p, t i, p j -> b i j")

    def sample(self, prompts: Sequence[str], rng: torch.Generator) -> Tensor:
        """(B, 16, 64) float32 clips of prompts."""
        own = torch.randn(len(prompts), FRAMES, SIDE * SIDE, generator=rng) * self.spectrum(torch.zeros(())).sqrt()
        return means(prompts) + self.turned(own, back=True)

    def velocity(self, x: Tensor, sigma: Tensor, mean: Tensor) -> Tensor:
        """(B, 16, 64) the exact E[eps - x0 | x_sigma = x].

        Args:
            sigma: (B,) noise levels in [0, 1].
            mean: (B, 1, 64) of the clips.
        """
        level = rearrange(sigma.to(x), "b -> b 1 1")
        variances = self.spectrum(x)
        slope = (level - (1 - level) * variances) / ((1 - level) ** 2 * variances + level**2)
        return self.turned(slope * self.turned(x - (1 - level) * mean), back=True) - mean


def means(prompts: Sequence[str]) -> Tensor:
    """(B, 1, 64) the pictures of prompts."""
    known = pictures()
    return rearrange(known[[PROMPTS.index(str(p)) for p in prompts]], "b p -> b 1 p")


# what is measured


def motion(x: Tensor) -> Tensor:
    """() mean squared change of a pixel from one frame to the next, of clips (B, 16, 64)."""
    return (x[:, 1:] - x[:, :-1]).square().mean()


def lag_one(x: Tensor) -> Tensor:
    """() correlation of a pixel with itself one frame later, over clips (B, 16, 64) of one prompt; each frame's mean
    over the clips is taken away first, so that a still picture that all share counts for nothing."""
    away = x - x.mean(dim=0, keepdim=True)
    covariance = (away[:, 1:] * away[:, :-1]).mean()
    return covariance / (away[:, 1:].square().mean() * away[:, :-1].square().mean()).sqrt()


def frame_scores(x: Tensor, scale: float = 1.0) -> Tensor:
    """(B, T) how near frames (B, T, 64) are to the wanted picture: minus the mean squared difference, at most 0."""
    return -reduce((x - scale * wanted().to(x)) ** 2, "b t p -> b t", "mean")
