"""Dense optical flow in torch, differentiable: Lucas and Kanade's least squares on a pyramid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

WINDOW = 9  # pixels; one flow vector is fitted to each window of this side
BLUR = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)  # before each level: slopes of single pixels say nothing of motion
LEVELS = 3  # of the pyramid, so that motions up to about WINDOW pixels are found
ITERATIONS = 3  # per level
RIDGE = 1e-5  # squared gradient per pixel below which a window has no texture, and no motion


def optical_flow(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(N, 2, H, W) motion in pixels, x then y: `first` at p is found in `second` at p + flow.

    What has no texture gets flow 0, and of an edge only the motion across it can be seen.

    Args:
        first, second: (N, 1, H, W) grey in [0, 1].
    """
    pyramid = [(blurred(first), blurred(second))]
    while len(pyramid) < LEVELS and min(pyramid[-1][0].shape[-2:]) >= 3 * WINDOW:
        before, after = (F.avg_pool2d(blurred(image), 2) for image in pyramid[-1])
        pyramid.append((before, after))
    flow = torch.zeros_like(pyramid[-1][0]).repeat(1, 2, 1, 1)
    for level, (before, after) in enumerate(reversed(pyramid)):
        if level:
            flow = 2 * F.interpolate(flow, size=before.shape[-2:], mode="bilinear", align_corners=False)
        for _ in range(ITERATIONS):
            found, inside = warp(after, flow)
            flow = flow + _increment(before, found, inside)
    return flow


def blurred(image: torch.Tensor) -> torch.Tensor:
    """(N, 1, H, W) smoothed by a small binomial kernel, the border continued outwards."""
    kernel = torch.tensor(BLUR, dtype=image.dtype, device=image.device)
    padded = F.pad(image, (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.reshape(1, 1, 1, 5)), kernel.reshape(1, 1, 5, 1))


def warp(media: torch.Tensor, flow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, C, H, W) `media` read at p + flow(p), bilinear, and (N, 1, H, W) whether that place is in the picture."""
    height, width = media.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=media.device, dtype=media.dtype),
        torch.arange(width, device=media.device, dtype=media.dtype),
        indexing="ij",
    )
    place = repeat(torch.stack([x, y]), "c h w -> n c h w", n=media.shape[0]) + flow
    size = torch.tensor([width, height], device=media.device, dtype=media.dtype)
    grid = (rearrange(place, "n c h w -> n h w c") * 2 + 1) / size - 1  # -1 and 1 are the outer edges of the border
    inside = (grid.abs() <= 1).all(dim=-1).unsqueeze(1)
    return F.grid_sample(media, grid, mode="bilinear", padding_mode="border", align_corners=False), inside


def _increment(first: torch.Tensor, second: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """(N, 2, H, W) flow that best explains second - first by the gradient, in least squares over each window.

    Args:
        seen: (N, 1, H, W) bool, False for pixels that have no say.
    """
    mean = (first + second) / 2
    dx, dy = _slope(mean, -1), _slope(mean, -2)
    dt = second - first
    products = torch.cat([dx * dx, dx * dy, dy * dy, dx * dt, dy * dt], dim=1) * seen
    padded = F.pad(products, (WINDOW // 2,) * 4, mode="replicate")
    xx, xy, yy, xt, yt = F.avg_pool2d(padded, WINDOW, stride=1).unbind(1)
    xx, yy = xx + RIDGE, yy + RIDGE
    determinant = xx * yy - xy * xy
    return -torch.stack([yy * xt - xy * yt, xx * yt - xy * xt], dim=1) / determinant.unsqueeze(1)


def _slope(image: torch.Tensor, dim: int) -> torch.Tensor:
    """Central difference along `dim` of (N, 1, H, W), per pixel; 0 outwards at the border."""
    size = image.shape[dim]
    index = torch.arange(size, device=image.device)
    return (
        image.index_select(dim, (index + 1).clamp(max=size - 1)) - image.index_select(dim, (index - 1).clamp(min=0))
    ) / 2
