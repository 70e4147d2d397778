"""What tells samples apart: one vector per sample, from pixels or from a network with features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange, reduce

from alignkit.errors import RecipeError
from alignkit.rewards.base import Reward
from alignkit.rewards.loading import made

Embedding = Callable[[torch.Tensor], torch.Tensor]
"""(B, 3, H, W) or (B, T, 3, H, W) in [0, 1] -> (B, D)."""

SIDE = 16  # of the thumbnails that are compared as pixels


@runtime_checkable
class HasImageFeatures(Protocol):
    """A network with one feature vector per image, such as a CLIP reward."""

    def image_features(self, media: torch.Tensor) -> torch.Tensor: ...


@runtime_checkable
class ClassToken(Protocol):
    """Features of a vision transformer; see `features.Features`."""

    cls: torch.Tensor


@runtime_checkable
class HasFeatures(Protocol):
    """A network with a class token per image, such as `features.DinoFeatures`."""

    def features(self, media: torch.Tensor) -> ClassToken: ...


def embedding(spec: Any, loaded: Mapping[str, Reward]) -> Embedding:
    """The features that `spec` names.

    Args:
        spec: "pixels" (thumbnails without their mean); the name of a reward in `loaded` or any spec of an object with
            `image_features(media)` or `features(media)`; or a callable `media -> (B, D)`.
        loaded: rewards that are loaded already.

    Raises:
        RecipeError: it has no features.
    """
    if spec == "pixels":
        return pixels
    found: Any = loaded[spec] if isinstance(spec, str) and spec in loaded else made(spec)
    if isinstance(found, HasImageFeatures):
        return _over_frames(found.image_features)
    if isinstance(found, HasFeatures):
        extractor = found
        return _over_frames(lambda media: extractor.features(media).cls)
    if callable(found) and not isinstance(found, Reward):
        return cast(Embedding, found)
    raise RecipeError(
        f"{spec!r} has no features to tell samples apart by; give 'pixels', a reward with image_features such as "
        "'pickscore', 'alignkit.rewards.features:DinoFeatures', or a callable media -> (B, D)"
    )


def pixels(media: torch.Tensor) -> torch.Tensor:
    """(B, D) thumbnails without their mean, so that the cosine compares the pictures and not their brightness."""
    flat = media if media.ndim == 4 else rearrange(media, "b t c h w -> b (t c) h w")
    small = F.interpolate(flat.float(), size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
    rows = rearrange(small, "b c h w -> b (c h w)")
    return rows - rows.mean(dim=1, keepdim=True)


def _over_frames(features: Embedding) -> Embedding:
    """Of a video, the mean over its frames."""

    def embed(media: torch.Tensor) -> torch.Tensor:
        if media.ndim == 4:
            return features(media)
        rows = features(rearrange(media, "b t c h w -> (b t) c h w"))
        return reduce(rows, "(b t) d -> b d", "mean", t=media.shape[1])

    return embed
