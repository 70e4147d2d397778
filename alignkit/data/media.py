"""Media files that prompts name: where they may lie, and how images are decoded."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from alignkit.errors import AlignkitError, DataError
from alignkit.types import Prompt

ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
"""Formats whose further pictures are frames; those of a JPEG (MPO) or TIFF are other pictures."""
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)
"""What Pillow raises for damaged files, and for those of no type that it knows."""
MAX_PIXELS = 89_478_485  # PIL's own limit before it warns of a decompression bomb


def inside(folder: Path, name: str) -> Path:
    """The file `name` in `folder`, as an absolute path.

    Args:
        folder: where the prompt file lies.
        name: a relative path with forward slashes, as written in a column.

    Raises:
        DataError: it is no relative path, leaves the folder (also through a link), or is not there.
    """
    path = Path(name)
    if "\0" in name or "://" in name:
        raise DataError(f"{name!r} is no path; expected a file relative to {folder}. Download it there first")
    if path.is_absolute() or path.drive or ".." in path.parts or "\\" in name:
        raise DataError(f"{name!r} may leave {folder}; expected a path inside it, with '/' and without '..'")
    resolved = (folder / path).resolve()
    if not resolved.is_relative_to(folder.resolve()):
        raise DataError(f"{name!r} is a link out of {folder}, to {resolved}; copy the file into the folder")
    if not resolved.is_file():
        raise DataError(f"{name!r} is not there; looked for {resolved}")
    return resolved


def load_animation(path: str | Path, choose: Callable[[int, int], Sequence[int]]) -> tuple[list[Image.Image], bool]:
    """Frames of an animated GIF, WebP, PNG or AVIF, or the one of a still, as 8-bit RGB; only those chosen are kept.

    The second value says whether there are several, chosen or not.

    Args:
        choose: indices of the frames wanted, from their number and the pixels of one.

    Raises:
        DataError: as of `load_image`.
    """
    with _readable(path, MAX_PIXELS) as image:
        animated = bool(image.format in ANIMATED and image.is_animated)  # type: ignore[attr-defined]
        wanted = choose(image.n_frames if animated else 1, image.width * image.height)  # type: ignore[attr-defined]
        kept: dict[int, Image.Image] = {}
        for index in sorted(set(wanted)):
            image.seek(index)
            kept[index] = _rgb(ImageOps.exif_transpose(image))
        if len({one.size for one in kept.values()}) > 1:
            raise DataError(f"{path} changes its size from frame to frame; write it anew at one size")
        return [kept[index] for index in wanted], animated


def load_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image file as 8-bit RGB, turned as its EXIF says; transparency is laid on white.

    16 bits per channel are scaled to 8, CMYK and palettes are converted.

    Raises:
        DataError: missing, empty, truncated or no image, or more than `max_pixels` pixels; names the file.
    """
    with _readable(path, max_pixels) as image:
        image.load()
        return _rgb(ImageOps.exif_transpose(image))


@contextmanager
def _readable(path: str | Path, max_pixels: int) -> Iterator[Image.Image]:
    """An image that is read, with what goes wrong then said of the file."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > max_pixels:
                raise DataError(
                    f"{path} has {image.width}x{image.height} pixels, more than {max_pixels}: refused as a "
                    "decompression bomb. Make it smaller, or pass max_pixels if it is meant"
                )
            yield image
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: refused as a decompression bomb: {error}") from error
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there") from error
    except UNREADABLE as error:
        if isinstance(error, AlignkitError):
            raise
        raise DataError(f"{path} cannot be read as an image, it is damaged or of another type: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; PIL's own conversion clips instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def load_images(prompt: Prompt, column: str = "image") -> list[Image.Image]:
    """The images that a prompt's column names, one or several.

    Raises:
        DataError: there is no such column, or a file cannot be read; names the prompt's line.
    """
    if column not in prompt.columns:
        found = ", ".join(sorted(prompt.columns)) or "none"
        raise DataError(f"prompt {prompt.id} {str(prompt)!r} has no column {column!r}; columns found: {found}")
    value = prompt.columns[column]
    paths = value if isinstance(value, (list, tuple)) else [value]
    try:
        return [load_image(path) for path in paths]
    except DataError as error:
        raise DataError(f"prompt {prompt.id} (its line or row in the prompt file), {column}: {error}") from error
