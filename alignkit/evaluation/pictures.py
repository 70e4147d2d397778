"""Sample files, images and clips, as the report needs them: embedded as data, measured, and text without secrets."""

from __future__ import annotations

import base64
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageSequence

from alignkit.data.frames import uniform
from alignkit.data.media import UNREADABLE
from alignkit.errors import DataError
from alignkit.evaluation.monitors import Statistic
from alignkit.evaluation.motion import Band, Course, bands, course, measures
from alignkit.evaluation.record import Picture
from alignkit.rewards.statistics import image_statistics

MAX_BYTES = 8 * 2**20  # of one embedded file
MAX_PIXELS = 256 * 2**20  # of all frames of one file that is measured
MEASURED_FRAMES = 16  # of a clip, evenly spread, whose image statistics are taken
KINDS = {
    (0, b"\x89PNG\r\n\x1a\n"): "image/png",
    (0, b"\xff\xd8\xff"): "image/jpeg",
    (0, b"GIF8"): "image/gif",
    (8, b"WEBP"): "image/webp",
    (4, b"ftyp"): "video/mp4",
}
"""MIME types by (place, bytes) at the start of a file."""

_SECRETS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{8,}|gh[pousr]_[A-Za-z0-9]{8,})|(?<=://)[^\s/@:]+:[^\s/@]+(?=@)"
)


@dataclass(frozen=True)
class Shown:
    """A picture or clip on the page: `uri` is empty where `problem` says why."""

    uri: str
    problem: str
    reads: Mapping[str, str]
    right: bool | None

    @property
    def plays(self) -> bool:
        """Whether it needs a `<video>`; animated images play by themselves."""
        return self.uri.startswith("data:video/")


@dataclass(frozen=True)
class Measured:
    """What one grid's files say.

    Attributes:
        statistics: of images, and of motion where there are clips; mean and standard deviation over the files.
        bands: curves over the frames of its clips; empty where there are none.
    """

    statistics: Mapping[str, Statistic]
    bands: Mapping[str, Band]


def show(picture: Picture, samples: Path) -> Shown:
    """Embed the file of a picture; only images and clips inside `samples` are read."""
    uri, problem = "", ""
    try:
        uri = _data_uri(_inside(picture.file, samples))
    except (OSError, ValueError) as error:
        problem = str(error)
    return Shown(uri, problem, picture.reads, picture.right)


def measure(pictures: Iterable[Picture], samples: Path) -> Measured:
    """Statistics and curves over the files that can be read; both empty if none."""
    values: dict[str, list[float]] = {}
    courses: list[Course] = []
    for picture in pictures:
        try:
            frames = _frames(_inside(picture.file, samples), picture.scale)
        except (OSError, ValueError, DataError):
            continue  # the page already shows why at the picture's place
        kept = frames[uniform(len(frames), min(MEASURED_FRAMES, len(frames)))]
        found = {name: float(value) for name, value in image_statistics(kept.unsqueeze(0).float() / 255).items()}
        if len(frames) > 1:
            courses.append(course(frames))
            found |= measures(courses[-1])
        for name, value in found.items():
            values.setdefault(name, []).append(value)
    joined = {name: torch.tensor(listed, dtype=torch.float64) for name, listed in values.items()}
    statistics = {name: Statistic(float(v.mean()), float(v.std(correction=0))) for name, v in joined.items()}
    return Measured(statistics, bands(courses))


def masked(text: str) -> str:
    """`text` with tokens and passwords in addresses replaced by dots."""
    return _SECRETS.sub("•••", text)


def _inside(file: Path, folder: Path) -> Path:
    real = file.resolve()
    if not real.is_relative_to(folder.resolve()):
        raise ValueError("not shown: the file is outside samples/")
    if not real.is_file():
        raise ValueError("the file is missing")
    return real


def _data_uri(file: Path) -> str:
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"not shown: larger than {MAX_BYTES // 2**20} MB")
    content = file.read_bytes()
    kind = kind_of(content[:16])
    if kind is None:
        raise ValueError("not shown: not a PNG, JPEG, GIF, WebP or MP4 file")
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def kind_of(start: bytes) -> str | None:
    """The MIME type of a file that begins so; None for those that a page does not show."""
    return next((kind for (place, magic), kind in KINDS.items() if start[place:].startswith(magic)), None)


def _frames(file: Path, scale: int) -> torch.Tensor:
    """(T, 3, H, W) uint8, T = 1 of a still image; as it was before it was enlarged `scale` times.

    Raises:
        OSError, DataError: the file is missing, damaged or of another type.
        ValueError: it is too large to be a sample.
    """
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES // 2**20} MB")
    with file.open("rb") as opened:
        kind = kind_of(opened.read(16))
    frames = _video_frames(file) if kind == "video/mp4" else _image_frames(file)
    if scale > min(frames.shape[-2:]):
        raise ValueError(f"enlarged {scale} times, and smaller than that")
    return frames[..., scale // 2 :: scale, scale // 2 :: scale]


def _video_frames(file: Path) -> torch.Tensor:
    # Only here: `alignkit report` also works where torchvision, which this loads, does not fit torch.
    from alignkit.data.video import read_pixels

    return read_pixels(file, most=MAX_PIXELS)


def _image_frames(file: Path) -> torch.Tensor:
    arrays: list[np.ndarray] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                for frame in ImageSequence.Iterator(image):
                    arrays.append(np.array(frame.convert("RGB")))
                    if len(arrays) * image.width * image.height > MAX_PIXELS:
                        raise ValueError(f"more than {MAX_PIXELS} pixels, too many to be a sample")
        except (*UNREADABLE, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(str(error)) from error
    return rearrange(torch.from_numpy(np.stack(arrays)), "t h w c -> t c h w")
