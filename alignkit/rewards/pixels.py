"""Media as 8-bit images, for readers and codecs that work on those."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange

from alignkit.errors import RewardError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what PIL and OpenCV use for grey


def to_uint8(media: torch.Tensor) -> np.ndarray:
    """(B, H, W, 3) uint8 RGB from (B, 3, H, W) float in [0, 1], rounded to nearest.

    Raises:
        RewardError: a sample has values that are not finite; they have no colour.
    """
    broken = ~media.isfinite().flatten(1).all(dim=1)
    if broken.any():
        raise RewardError(
            f"sample {int(broken.nonzero()[0, 0])} has pixels that are NaN or infinite; usual cause: a decoder in fp16"
        )
    pixels = (media.detach().clamp(0, 1) * 255).round().to(device="cpu", dtype=torch.uint8)
    return np.ascontiguousarray(rearrange(pixels, "b c h w -> b h w c").numpy())


def luminance(media: torch.Tensor) -> torch.Tensor:
    """(..., H, W) grey in [0, 1] from (..., 3, H, W) RGB; differentiable."""
    weights = torch.tensor(LUMA, dtype=media.dtype, device=media.device)
    return torch.einsum("...chw,c->...hw", media, weights)
