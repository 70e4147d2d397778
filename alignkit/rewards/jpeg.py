"""How many bytes an image takes as JPEG: the plainest reward that a model can be aligned with (DDPO, 2305.13301)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image

from alignkit.errors import RecipeError
from alignkit.rewards.card import Card
from alignkit.rewards.pixels import to_uint8
from alignkit.types import Prompt


def kilobytes(media: torch.Tensor, quality: int) -> torch.Tensor:
    """(B,) float32 sizes of (B, 3, H, W) in [0, 1] as JPEG files, in 1000 bytes."""
    sizes: list[float] = []
    for pixels in to_uint8(media):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes)


class JPEGCompressibility:
    """Minus the size in kB; higher is more compressible.

    Args:
        quality: PIL's JPEG quality, 1 to 95; DDPO uses 95.
    """

    name = "jpeg_compressibility"
    kind = "image"
    differentiable = False
    card: ClassVar[Card] = Card(
        family="statistics",
        summary="the picture's JPEG file is small",
        range="at most 0, minus kB",
        cost="one JPEG encoding",
        source="DDPO, 2305.13301",
    )

    def __init__(self, quality: int = 95) -> None:
        if not 1 <= quality <= 95:
            raise RecipeError(f"quality={quality}; PIL's JPEG quality goes from 1 to 95")
        self.quality = quality

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) in kB."""
        return -kilobytes(media, self.quality)

    def describe(self) -> dict[str, Any]:
        """The quality, without which the number means nothing."""
        return {"quality": self.quality}


class JPEGIncompressibility:
    """The size in kB; higher is harder to compress.

    Args:
        quality: as for `JPEGCompressibility`.
    """

    name = "jpeg_incompressibility"
    kind = "image"
    differentiable = False
    card: ClassVar[Card] = Card(
        family="statistics",
        summary="the picture's JPEG file is large",
        range="at least 0, kB",
        cost="one JPEG encoding",
        source="DDPO, 2305.13301",
    )

    def __init__(self, quality: int = 95) -> None:
        self._opposite = JPEGCompressibility(quality)

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) in kB."""
        return -self._opposite(media, prompts)

    def describe(self) -> dict[str, Any]:
        """As for `JPEGCompressibility`."""
        return self._opposite.describe()
