"""The exact velocity of the clips and a small trained correction, with the surface of `alignkit.Policy`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from alignkit.flow.transition import Rng, draw_noise, per_sample_generators
from alignkit.types import Prompt
from recipes.clips.world import FRAMES, PROMPTS, SIDE, Clips, means, wanted
from recipes.mixture.policy import Corrections, MixturePolicy, Points

FREQUENCIES = 4
WIDTH = 64
SCALE = 8.0
"""A pixel is 0.5 + x / SCALE: four standard deviations reach black and white."""


class Network(nn.Module):
    """(clips (B, 16, 64), sigma (B,), prompts (B,)) -> (B, 16, 64), 0 before training.

    Convolutions over time: frames share weights, as in a video model, and each knows its place.
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        given = SIDE * SIDE + 2 * FREQUENCIES + 2 * FREQUENCIES + len(PROMPTS)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.hidden = nn.Sequential(
                nn.Conv1d(given, width, 3, padding=1), nn.SiLU(), nn.Conv1d(width, width, 3, padding=1), nn.SiLU()
            )
            self.last = nn.Conv1d(width, SIDE * SIDE, 1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        place = waves(torch.arange(FRAMES) / FRAMES)
        told = torch.cat([waves(sigma), nn.functional.one_hot(prompt, len(PROMPTS)).float()], dim=-1)
        given = [x, repeat(place, "t c -> b t c", b=len(x)), repeat(told, "b c -> b t c", t=FRAMES)]
        hidden = self.hidden(rearrange(torch.cat(given, dim=-1), "b t c -> b c t"))
        return rearrange(self.last(hidden), "b c t -> b t c")


def waves(value: Tensor) -> Tensor:
    """(N, 8) sines and cosines of numbers (N,) in [0, 1]."""
    angles = value[:, None].float() * torch.arange(1, FREQUENCIES + 1) * math.pi / 2
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ClipPolicy(MixturePolicy):
    """Rectified flow of `Clips` with a trained correction; sampling and companions are those of the mixture's policy.

    Args:
        width: of the correction's hidden layers.
        seed: of its first values; its last layer is 0.

    Attributes:
        calls: clips that the velocity was asked of so far.
    """

    def __init__(self, clips: Clips | None = None, width: int = WIDTH, seed: int = 0) -> None:
        super().__init__()
        self.clips = clips or Clips()
        self.weights = Corrections(Network(width, seed))  # type: ignore[arg-type]
        self.calls = 0

    def initial_latents(self, cond: Points, rng: Rng) -> Tensor:
        """(B, 16, 64) standard normal."""
        generators = rng if isinstance(rng, list) else per_sample_generators(rng, len(cond))
        return draw_noise(torch.zeros(len(cond), FRAMES, SIDE * SIDE), generators)

    def velocity(self, x: Tensor, t: Tensor | float, cond: Points | None = None) -> Tensor:
        """(B, 16, 64) dx/dsigma at clips (B, 16, 64) and timestep `t`, a number or (B,)."""
        assert cond is not None
        self.calls += len(x)
        sigma = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        exact = self.clips.velocity(x, sigma, means(cond.prompts))
        name = self.weights.active
        if name is None:
            return exact
        return exact + self.weights.own[name](x, sigma, numbers(cond.prompts))  # type: ignore[call-arg]

    model_output = velocity
    prediction_at = velocity

    def num_frames(self, cond: Points) -> int:
        """16."""
        return FRAMES

    def decode(self, x0: Tensor, cond: Points, frames: int | None = None) -> Tensor:
        """(B, frames, 3, 8, 8) grey videos in [0, 1]; outside the gradient passes straight through."""
        media = repeat(0.5 + x0[:, :frames] / SCALE, "b t (h w) -> b t c h w", c=3, h=SIDE)
        return media + (media.clamp(0, 1) - media).detach()


def numbers(prompts: Sequence[str]) -> Tensor:
    """(B,) int64 which prompt each is."""
    return torch.tensor([PROMPTS.index(str(p)) for p in prompts])


@dataclass(frozen=True, eq=False)
class Spot:
    """An image reward: minus the mean squared difference from the wanted picture, in units of the clips, at most 0."""

    name: str = "spot"
    kind: str = "image"
    differentiable: bool = True

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B,) of (B, 3, 8, 8)."""
        x = (rearrange(media[:, 0], "b h w -> b (h w)") - 0.5) * SCALE
        return -(x - wanted()).square().mean(dim=1)
