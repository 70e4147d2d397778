"""HPSv3: a human preference score as a Gaussian, from Qwen2-VL-7B with a reward head (Ma et al., arXiv 2508.03789)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from alignkit.rewards.card import Card
from alignkit.rewards.token_head import (
    BASE_PATTERNS,
    check_for_tokens,
    current_names,
    load_state,
    load_token_reward,
    ratings,
    template_of,
    tiny_state,
    write_tiny_base,
)
from alignkit.rewards.vision_language import Chat, VisionLanguage
from alignkit.rewards.weights import Files, locate
from alignkit.types import Prompt

TOKEN = "<|Reward|>"
FILE = "HPSv3.safetensors"
TEMPLATE = (
    "Judge this generated picture as a person choosing between pictures would: how good it looks, and how well it "
    "shows what was asked for.\nAsked for: {prompt}\nOverall preference, from 0 (worst) to 10 (best): <|Reward|>"
)


def build_head(width: int) -> nn.Module:
    """width-1024-16-2, to the mean and the logarithm of the standard deviation."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def win_probability(mean: torch.Tensor, std: torch.Tensor, points: int = 32) -> torch.Tensor:
    """(B,) E[sigmoid(z)] for z ~ N(mean, std^2), by Gauss-Hermite quadrature (published: 1000 random draws).

    Args:
        mean, std: (B,) of the difference of two scores; std = sqrt(std_a^2 + std_b^2).
    """
    nodes, weights = np.polynomial.hermite.hermgauss(points)
    z = mean.unsqueeze(1) + 2**0.5 * std.unsqueeze(1) * torch.as_tensor(nodes, dtype=mean.dtype, device=mean.device)
    share = torch.as_tensor(weights / np.pi**0.5, dtype=mean.dtype, device=mean.device)
    return (z.sigmoid() * share).sum(dim=1)


@dataclass(frozen=True, eq=False)
class HPSv3:
    """The mean of HPSv3's Gaussian over human preference for a picture and its prompt.

    Published scores come from the authors' instruction text; the one here is alignkit's own, so scores are close to
    published ones in order and not in value. For theirs give `template` a file with their text.

    Attributes:
        weights: a hub id or folder with `HPSv3.safetensors`, or that file.
        base: the model it was trained from, of which configuration, tokenizer and image processor are read.
        template: file with the text that is asked, `{prompt}` and `<|Reward|>` once each; None: alignkit's.
        pixels: every picture is resized to about this many, sides multiples of 28; 448x448 as published.
        batch_size: pictures in one forward.
        checkpointing: recompute each batch in the backward.
        dtype: of the backbone; the head is float32.
    """

    weights: str = "MizzenAI/HPSv3"
    base: str = "Qwen/Qwen2-VL-7B-Instruct"
    template: str | None = None
    pixels: int = 256 * 28 * 28
    batch_size: int = 4
    checkpointing: bool = False
    dtype: str = "bfloat16"
    name: str = "hpsv3"

    kind = "image"
    differentiable = True
    card: ClassVar[Card] = Card(
        family="preference",
        summary="people would prefer the picture, for its looks and for its prompt",
        range="unbounded, about 0 to 15",
        licence="MIT (HPSv3), Apache-2.0 (Qwen2-VL)",
        cost="8.3 billion parameters, 17 GB in bfloat16; a GPU",
        source="2508.03789",
    )

    def __post_init__(self) -> None:
        _ = self.question

    @cached_property
    def question(self) -> str:
        """The text asked, with `{prompt}`."""
        return template_of(self.template, TEMPLATE, (TOKEN,))

    def files(self) -> tuple[Files, ...]:
        """The reward's weights and the base model's tokenizer and processor."""
        return Files(self.weights, (FILE,)), Files(self.base, BASE_PATTERNS)

    @cached_property
    def reader(self) -> VisionLanguage:
        """The network; read at its first use."""
        weights, base = (locate(files) for files in self.files())
        state = current_names(load_state(weights / FILE if weights.is_dir() else weights))
        options = {"batch_size": self.batch_size, "checkpointing": self.checkpointing}
        size = {"shortest_edge": self.pixels, "longest_edge": self.pixels}
        return load_token_reward(state, base, build_head, (TOKEN,), self.dtype, size=size, **options)

    def prepare(self) -> None:
        """Read the weights now."""
        _ = self.reader

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError for a prompt that holds the reward token."""
        check_for_tokens(prompts, (TOKEN,))

    def gaussian(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, standard deviation), (B,) each, of the preference for (B, 3, H, W); differentiable."""
        self.check_prompts(prompts)
        asked = [self.question.replace("{prompt}", prompt) for prompt in prompts]
        chats = [Chat((picture, text)) for picture, text in zip(media, asked, strict=True)]
        mean, log_std = ratings(self.reader, chats, (TOKEN,), 2)[:, 0].unbind(dim=1)
        return mean, log_std.exp()

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) means."""
        return self.gaussian(media, prompts)[0]

    def uncertainty(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) standard deviations, above 0."""
        return self.gaussian(media, prompts)[1]

    def compare(self, first: torch.Tensor, second: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) probability that `first[i]` is preferred, over both pictures' uncertainty."""
        (mean_a, std_a), (mean_b, std_b) = (self.gaussian(media, prompts) for media in (first, second))
        return win_probability(mean_a - mean_b, (std_a**2 + std_b**2).sqrt())

    @classmethod
    def tiny(cls, folder: Path) -> dict[str, Any]:
        """Random weights under the published names; returns the options that load them."""
        from safetensors.torch import save_file

        base, weights = folder / "Qwen2-VL-7B-Instruct", folder / "HPSv3"
        config = write_tiny_base(base)
        weights.mkdir(parents=True, exist_ok=True)
        save_file(tiny_state(config, build_head(config.text_config.hidden_size), 1), weights / FILE)
        return {"weights": str(weights), "base": str(base), "pixels": 4 * 28 * 28, "dtype": "float32"}
