"""The colour names of GenEval and which of them a part of an image is nearest to, without any weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from alignkit.errors import RewardError

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "orange": (245, 135, 20),
    "yellow": (245, 220, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 200),
    "purple": (130, 50, 160),
    "pink": (245, 150, 190),
    "brown": (120, 75, 40),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}
"""sRGB in 0..255, one typical value for each name; where a name begins and ends is a convention."""


def lab(colours: torch.Tensor) -> torch.Tensor:
    """(..., 3) CIE L*a*b* (D65) of (..., 3) sRGB in [0, 1]."""
    linear = torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    to_xyz = linear.new_tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = linear @ to_xyz.T / linear.new_tensor([0.95047, 1.0, 1.08883])
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=0) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def nearest(colours: torch.Tensor, names: Sequence[str] = tuple(COLOURS)) -> torch.Tensor:
    """(N,) index into `names` of the colour nearest in L*a*b* to each of (N, 3) sRGB in [0, 1].

    Raises:
        RewardError: a name has no known colour.
    """
    unknown = [name for name in names if name not in COLOURS]
    if unknown:
        raise RewardError(f"no colour is known by the name {unknown[0]!r}; choose one of {', '.join(COLOURS)}")
    table = torch.tensor([COLOURS[name] for name in names], dtype=colours.dtype, device=colours.device) / 255
    return torch.cdist(lab(colours), lab(table)).argmin(dim=1)


def colour_of(crop: torch.Tensor, mask: torch.Tensor | None, names: Sequence[str] = tuple(COLOURS)) -> str:
    """The name that most of an object's pixels are nearest to.

    Args:
        crop: (3, h, w) in [0, 1], the object's box.
        mask: (h, w) bool, its pixels; None: the middle half of the box each way, where most objects are.

    Raises:
        RewardError: the mask has no pixel, so that the object has no colour.
    """
    if mask is None:
        height, width = crop.shape[-2:]
        crop = crop[:, height // 4 : height - height // 4, width // 4 : width - width // 4]
        mask = torch.ones(crop.shape[-2:], dtype=torch.bool, device=crop.device)
    if not mask.any():
        raise RewardError(f"the mask of an object, {tuple(mask.shape)} of its box, has no pixel; it has no colour")
    votes = nearest(crop[:, mask].T, names)
    return names[int(votes.bincount(minlength=len(names)).argmax())]
