"""Videos as files: read frame by frame or by time, and written as mp4, animated WebP or a sheet of pictures."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from alignkit.data.frames import at_rate, uniform
from alignkit.data.media import load_animation, load_image
from alignkit.data.video_decoding import decoded, inspect_video
from alignkit.errors import DataError

MOST = 2**30  # pixels of all frames that are read at once, 12 GB as float: more is a bomb, or a mistake
SLOWEST, FASTEST = 1e-3, 1e6  # frames per second that a file can say
GAP, GREY = 2, 200  # of a contact sheet: pixels between frames, and their grey level

FrameChoice = int | Callable[[int], Sequence[int]] | None
"""So many frames, spread evenly; or indices from the number of frames there are (`data.frames`); or all."""


def read_video(path: str | Path, frames: FrameChoice = None, *, fps: float | None = None) -> torch.Tensor:
    """(T, 3, H, W) float in [0, 1] of a video file or a folder of frames, turned as the file says.

    Only the frames that are asked for are kept, in the order asked for.

    Args:
        frames: which, by index.
        fps: which, by time: those on screen at this many evenly spaced moments per second.

    Raises:
        DataError: it is missing, empty, truncated, damaged, no video, too large, or has fewer frames; names the file.
    """
    return read_pixels(path, frames, fps=fps).float() / 255


def read_pixels(
    path: str | Path, frames: FrameChoice = None, *, fps: float | None = None, most: int | None = None
) -> torch.Tensor:
    """(T, 3, H, W) uint8: as `read_video`, in a quarter of its memory.

    Args:
        most: pixels of all frames asked for; more are refused. None: `MOST`.
    """
    path = Path(path)
    if frames is not None and fps is not None:
        raise DataError(f"{path}: frames={frames} and fps={fps}; frames are chosen by index or by time, give one")
    if path.is_dir():
        return _folder(path, frames, fps)
    if _is_webp(path):
        return _animation(path, frames, fps, most)
    facts = inspect_video(path)
    if fps is not None:
        refuse_many(path, facts.times[-1] * fps + 1, facts.pixels, most)
    chosen = at_rate(facts.times, fps) if fps is not None else _chosen(path, frames, len(facts.times))
    refuse_many(path, len(chosen), facts.pixels, most)
    pixels, _ = decoded(path, facts, chosen)
    return rearrange(torch.from_numpy(pixels), "t h w c -> t c h w")


def refuse_many(path: Path, frames: float, pixels: int, most: int | None = None) -> None:
    """Raises DataError where so many frames of so many pixels are more than `most` pixels, or `MOST`."""
    most = MOST if most is None else most
    if frames * pixels > most:
        raise DataError(
            f"{path}: {frames:.0f} frames of {pixels} pixels are more than the {most} pixels that are read at once; "
            "choose fewer frames, or make it smaller"
        )


def _is_webp(path: Path) -> bool:
    """FFmpeg reads no animated WebP, as `write_webp` makes it."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(12)[8:] == b"WEBP"


def _animation(path: Path, frames: FrameChoice, fps: float | None, most: int | None) -> torch.Tensor:
    if fps is not None:
        raise DataError(f"{path} is an animated picture; choose its frames by index, not fps={fps}")

    def choose(available: int, pixels: int) -> list[int]:
        chosen = _chosen(path, frames, available)
        refuse_many(path, len(chosen), pixels, most)
        return chosen

    return torch.stack([pil_to_tensor(one) for one in load_animation(path, choose)[0]])


def _chosen(path: Path, frames: FrameChoice, available: int) -> list[int]:
    if frames is None:
        return list(range(available))
    if isinstance(frames, int) and frames > available:
        raise DataError(f"{path} has {available} frames, expected at least {frames}")
    indices = uniform(available, frames) if isinstance(frames, int) else [int(i) for i in frames(available)]
    if not indices or not all(0 <= i < available for i in indices):
        raise DataError(f"{path} has {available} frames, and those asked for are {indices}; they count from 0")
    return indices


def _folder(path: Path, frames: FrameChoice, fps: float | None) -> torch.Tensor:
    if fps is not None:
        raise DataError(f"{path} is a folder of frames, which has no times; choose frames by index, not fps={fps}")
    files = sorted(path.glob("*.png"))
    if not files:
        raise DataError(f"{path} has no frames; expected 000.png, 001.png, ...")
    return torch.stack([pil_to_tensor(load_image(files[i])) for i in _chosen(path, frames, len(files))])


# writing


@contextmanager
def _aside(path: str | Path) -> Iterator[Path]:
    """A file that becomes `path` when all is written: who reads `path` never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _bytes(media: torch.Tensor, dims: str) -> np.ndarray:
    """(..., H, W, 3) uint8 of (..., 3, H, W) in [0, 1]; dims: names of the axes before, such as "t"."""
    axes = len(dims.split()) + 3
    if media.ndim != axes or media.shape[-3] != 3 or 0 in media.shape:
        raise DataError(f"media of shape {tuple(media.shape)}; expected ({', '.join(dims.upper().split())}, 3, H, W)")
    if not bool(media.isfinite().all()):
        raise DataError("media have pixels that are NaN or infinite; usual cause: a decoder in fp16")
    pixels = (media.detach().clamp(0, 1) * 255).round().to(device="cpu", dtype=torch.uint8)
    return np.ascontiguousarray(rearrange(pixels, f"{dims} c h w -> {dims} h w c").numpy())


def _larger(pixels: np.ndarray, scale: int) -> np.ndarray:
    if scale < 1:
        raise DataError(f"scale={scale}; expected a whole number of at least 1")
    return repeat(pixels, "... h w c -> ... (h s) (w z) c", s=scale, z=scale)


def write_mp4(path: str | Path, media: torch.Tensor, fps: float, *, scale: int = 1) -> None:
    """Write (T, 3, H, W) in [0, 1] as H.264 in BT.709, nearly without loss, as every player and browser reads it.

    H.264 stores colour for every second pixel and so needs even sides: where one is odd, its last row or column of
    pixels is written twice.

    Args:
        fps: frames per second.
        scale: every pixel becomes scale x scale.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    pixels = _larger(_bytes(media, "t"), scale)
    _, high, wide, _ = pixels.shape
    pixels = np.pad(pixels, ((0, 0), (0, high % 2), (0, wide % 2), (0, 0)), mode="edge")
    with _aside(path) as aside, av.open(str(aside), "w", format="mp4", options={"movflags": "faststart"}) as file:
        stream = file.add_stream("libx264", rate=_rate(fps), options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = Colorspace.ITU709, 1, 1
        context.color_range = ColorRange.MPEG
        for one in pixels:
            frame = av.VideoFrame.from_ndarray(one, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def _rate(fps: float) -> Fraction:
    if not SLOWEST <= fps <= FASTEST:
        raise DataError(f"fps={fps}; expected from {SLOWEST:g} to {FASTEST:.0f} frames per second")
    return Fraction(fps).limit_denominator(1001)  # as in 24000/1001


def write_webp(path: str | Path, media: torch.Tensor, fps: float, scale: int = 1) -> None:
    """Write (T, 3, H, W) in [0, 1] as an animated WebP without loss that plays over and over.

    Args:
        fps: frames per second, kept to the millisecond.
        scale: every pixel becomes scale x scale.
    """
    pixels = _larger(_bytes(media, "t"), scale)
    ends = [round(1000 * k / _rate(fps)) for k in range(len(pixels) + 1)]
    lengths = [end - start for start, end in pairwise(ends)]
    first, *rest = [Image.fromarray(one) for one in pixels]
    with _aside(path) as aside:
        first.save(aside, "WEBP", save_all=True, append_images=rest, duration=lengths, loop=0, lossless=True, method=4)


def contact_sheet(
    media: torch.Tensor, rows: int | None = None, columns: int | None = None, *, scale: int = 1
) -> Image.Image:
    """Clips (B, T, 3, H, W) in [0, 1] below each other, each as frames in a row, evenly spread from first to last.

    Args:
        rows: the first so many clips; None: all.
        columns: so many frames; None: all, at most 9.
        scale: every pixel becomes scale x scale.
    """
    clips, frames = media.shape[0] if rows is None else rows, min(media.shape[1], 9) if columns is None else columns
    if media.ndim != 5 or not 0 < clips <= media.shape[0] or not 0 < frames <= media.shape[1]:
        raise DataError(
            f"a contact sheet of {clips} clips and {frames} frames from media of shape {tuple(media.shape)}; expected "
            "(B, T, 3, H, W) with so many or more"
        )
    pixels = _larger(_bytes(media[:clips, uniform(media.shape[1], frames)], "b t"), scale)
    framed = np.pad(pixels, ((0, 0), (0, 0), (GAP, 0), (GAP, 0), (0, 0)), constant_values=GREY)
    sheet = rearrange(framed, "b t h w c -> (b h) (t w) c")
    return Image.fromarray(np.pad(sheet, ((0, GAP), (0, GAP), (0, 0)), constant_values=GREY))
