"""Media brought to the size a network wants, in the ways that image models were trained with; differentiable."""

from __future__ import annotations

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from alignkit.errors import RecipeError


def fit(
    media: torch.Tensor,
    size: tuple[int, int],
    mode: str = "shortest",
    interpolation: str = "bicubic",
    fill: float = 0.0,
) -> torch.Tensor:
    """(B, 3, *size) from (B, 3, H, W), resized with antialias.

    The rounding is open_clip's (`open_clip.transform.image_transform`), which is torchvision's for squares.

    Args:
        size: height and width.
        mode: "shortest" fills the size and crops the rest away around the centre; "longest" shows the whole image and
            pads; "squash" changes the proportions.
        interpolation: "bicubic" or "bilinear".
        fill: value of the padding, in [0, 1].

    Raises:
        RecipeError: no such mode.
    """
    if mode == "squash":
        return _resize(media, size, interpolation)
    height, width = media.shape[-2:]
    ratios = (height / size[0], width / size[1])
    if mode == "shortest":
        new = _shortest(height, width, size, min(ratios))
        return TF.center_crop(_resize(media, new, interpolation), list(size))
    if mode == "longest":
        return _pad(_resize(media, _scaled(height, width, max(ratios)), interpolation), size, fill)
    raise RecipeError(f"resize_mode={mode!r}; choose shortest, longest or squash")


def _resize(media: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    return TF.resize(media, list(size), interpolation=InterpolationMode(interpolation), antialias=True)


def _scaled(height: int, width: int, ratio: float) -> tuple[int, int]:
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def _shortest(height: int, width: int, size: tuple[int, int], ratio: float) -> tuple[int, int]:
    if size[0] != size[1]:
        return _scaled(height, width, ratio)
    short, long = sorted((height, width))
    other = int(size[0] * long / short)  # torchvision's Resize to one number rounds down
    return (size[0], other) if height <= width else (other, size[0])


def _pad(media: torch.Tensor, size: tuple[int, int], fill: float) -> torch.Tensor:
    """Centred; what is still too large by a rounding is cropped."""
    down, right = (max(wanted - given, 0) for wanted, given in zip(size, media.shape[-2:]))
    padded = TF.pad(media, [right // 2, down // 2, (right + 1) // 2, (down + 1) // 2], fill=fill)
    return TF.center_crop(padded, list(size))
