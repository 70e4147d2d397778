"""Clips as files that a page can show: animated WebP, or H.264 where that would be too large."""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from PIL import Image

from alignkit.data.video import write_mp4, write_webp
from alignkit.evaluation.pictures import MAX_BYTES
from alignkit.rewards.pixels import to_uint8

FPS = 8.0  # frames per second at which clips are played where nothing else is asked
LONGEST = 5.0  # seconds in which a clip is played on a page
SMALLEST = 128  # pixels of the shorter side of a clip on a page
MAX_WEBP_PIXELS = 8 * 2**20  # over all frames; more are written as H.264 at once, which is far smaller


def playback_rate(num_frames: int) -> float:
    """Frames per second at which a clip is shown: `FPS`, or what shows all of it in `LONGEST` seconds."""
    return max(FPS, num_frames / LONGEST)


def enlargement(media: torch.Tensor) -> int:
    """How many times a clip (T, 3, H, W) is enlarged, so that its shorter side has `SMALLEST` pixels."""
    return max(1, -(-SMALLEST // min(media.shape[-2:])))


def write_clip(stem: Path, media: torch.Tensor, fps: float, scale: int = 1) -> Path:
    """Write (T, 3, H, W) in [0, 1] as `STEM.webp`, which loops and keeps every pixel, or else as `STEM.mp4`.

    H.264 is for clips that are larger than `MAX_BYTES` as WebP, and for those with equal neighbouring frames, which
    a WebP joins: it would no longer say how many there were.

    Args:
        stem: the path without its ending.
        fps: frames per second.
        scale: each pixel becomes `scale` x `scale` pixels.
    """
    webp, mp4 = (stem.with_name(f"{stem.name}.{ending}") for ending in ("webp", "mp4"))
    for old in (webp, mp4):
        old.unlink(missing_ok=True)
    frames, _, high, wide = media.shape
    if frames * high * wide * scale**2 <= MAX_WEBP_PIXELS and not _joins(media):
        write_webp(webp, media, fps, scale=scale)
        if webp.stat().st_size <= MAX_BYTES:
            return webp
        webp.unlink()
    write_mp4(mp4, media, fps, scale=scale)
    return mp4


def write_sheet(stem: Path, sheet: Image.Image) -> Path:
    """Save a sheet of frames as `STEM.png`, or as `STEM.jpg` where that would be too large for a page."""
    png, jpeg = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.jpg")
    jpeg.unlink(missing_ok=True)
    sheet.save(png)
    if png.stat().st_size <= MAX_BYTES:
        return png
    png.unlink()
    sheet.save(jpeg, quality=90)
    return jpeg


def _joins(media: torch.Tensor) -> bool:
    """Whether two neighbouring frames have the same 8-bit pixels."""
    pixels = rearrange(to_uint8(media), "t h w c -> t (h w c)")
    return len(pixels) < 2 or bool((pixels[1:] == pixels[:-1]).all(axis=1).any())
