"""LAION's aesthetic predictor: what people gave a picture on a scale from 1 to 10, from CLIP's image features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from alignkit.rewards.card import Card
from alignkit.rewards.clip import IMAGES, MODEL, clip_model, image_processor, pixels, write_tiny_clip
from alignkit.rewards.dual_encoder import fill
from alignkit.rewards.random_weights import random_network
from alignkit.rewards.tensor_files import read_tensors
from alignkit.rewards.weights import Files, frozen, locate, on
from alignkit.types import Prompt

HEAD = "sac+logos+ava1-l14-linearMSE.pth|aesthetic-model.pth"


class LinearHead(nn.Module):
    """width-1024-128-64-16-1 without activations; Dropout keeps the published numbering and does nothing here.

    Both LAION's predictor and ImageReward end in it, under the names `layers.0`, `2`, `4`, `6` and `7`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        drop = nn.Dropout
        self.layers = nn.Sequential(
            *(nn.Linear(width, 1024), drop(0.2), nn.Linear(1024, 128), drop(0.2)),
            *(nn.Linear(128, 64), drop(0.1), nn.Linear(64, 16), nn.Linear(16, 1)),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B,) from (B, width)."""
        return self.layers(features)[:, 0]


def linear_head(state: Mapping[str, torch.Tensor], source: str) -> LinearHead:
    """The head with these weights, as wide as its first layer says. Raises RewardError where one is missing."""
    first = state.get("layers.0.weight", torch.empty(0, 768))
    head = LinearHead(first.shape[-1])
    fill(head, state, source)
    return head


class AestheticNetwork(nn.Module):
    """CLIP's image tower and the head; the head stays in float32."""

    def __init__(self, clip: Any, head: LinearHead) -> None:
        super().__init__()
        self.vision, self.projection, self.head = clip.vision_model, clip.visual_projection, head

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B,) from normalised (B, 3, H, W)."""
        features = self.projection(self.vision(pixel_values=pixel_values).pooler_output)
        return self.head(F.normalize(features.float(), dim=-1))


@dataclass(frozen=True, eq=False)
class Aesthetic:
    """How beautiful people find the picture, from 1 to 10, by LAION's aesthetic predictor v2; prompts do not matter.

    The predictor `sac+logos+ava1-l14-linearMSE` on features of CLIP ViT-L/14 of length 1. Its author publishes it on
    GitHub (christophschuhmann/improved-aesthetic-predictor); the hub id in `weights` holds the same layers as
    `aesthetic-model.pth`, which DDPO and TRL use.

    Attributes:
        weights: hub id, folder or file of the head.
        clip: hub id or folder of CLIP ViT-L/14 in transformers' layout.
        dtype: of CLIP, "float32", "bfloat16" or "float16"; head and scores are float32.
    """

    name: str = "aesthetic"
    weights: str = "trl-lib/ddpo-aesthetic-predictor"
    clip: str = "openai/clip-vit-large-patch14"
    dtype: str = "float32"
    kind: ClassVar[str] = "image"
    differentiable: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        family="preference",
        summary="people find the picture beautiful, whatever the prompt",
        range="about 1 to 10, mostly 5 to 6.5",
        licence="Apache-2.0 (head), MIT (CLIP's code)",
        cost="305 M parameters, 1.2 GB",
        source="LAION-Aesthetics v2",
    )

    def files(self) -> tuple[Files, ...]:
        """The head, then CLIP with its image processor."""
        return (Files(self.weights, (HEAD,)), Files(self.clip, (*MODEL, *IMAGES)))

    @cached_property
    def network(self) -> AestheticNetwork:
        head, _ = self.files()
        state = read_tensors(locate(head), HEAD)
        linear = linear_head(state, self.weights)
        frozen(linear)
        return AestheticNetwork(clip_model(self.clip, self.dtype), linear)

    @cached_property
    def images(self) -> Any:
        return image_processor(self.clip)

    def prepare(self) -> None:
        """Read the weights now; raises what the first call would raise."""
        _ = self.network, self.images

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) float32."""
        if not len(prompts):
            return media.float().sum(dim=(1, 2, 3))
        network = on(self.network, media.device)
        return network(pixels(self.images, media, next(self.network.vision.parameters()).dtype))

    @classmethod
    def tiny(cls, folder: Path) -> dict[str, Any]:
        """A random CLIP of 32 dimensions and a random head, in the published layout."""
        write_tiny_clip(folder)
        torch.save(random_network(lambda: LinearHead(32)).state_dict(), folder / "aesthetic-model.pth")
        return {"weights": str(folder / "aesthetic-model.pth"), "clip": str(folder)}
