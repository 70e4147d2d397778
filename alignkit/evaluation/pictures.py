"""Sample files as the report needs them: embedded as data, measured, and text without secrets."""

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
from PIL import Image

from alignkit.evaluation.monitors import Statistic
from alignkit.evaluation.record import Picture
from alignkit.rewards.statistics import image_statistics

MAX_BYTES = 8 * 2**20  # of one embedded file
KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}

_SECRETS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{8,}|gh[pousr]_[A-Za-z0-9]{8,})|(?<=://)[^\s/@:]+:[^\s/@]+(?=@)"
)


@dataclass(frozen=True)
class Shown:
    """A picture on the page: `uri` is empty where `problem` says why."""

    uri: str
    problem: str
    reads: Mapping[str, str]
    right: bool | None


def show(picture: Picture, samples: Path) -> Shown:
    """Embed the file of a picture; only image files inside `samples` are read."""
    uri, problem = "", ""
    try:
        uri = _data_uri(_inside(picture.file, samples))
    except (OSError, ValueError) as error:
        problem = str(error)
    return Shown(uri, problem, picture.reads, picture.right)


def statistics(pictures: Iterable[Picture]) -> dict[str, Statistic]:
    """Mean and standard deviation of every image statistic over the files that can be read; empty if none."""
    by_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for picture in pictures:
        try:
            media = _pixels(picture.file)
        except (OSError, ValueError):
            continue  # the page already shows why at the picture's place
        by_shape.setdefault(media.shape, []).append(media)
    values: dict[str, list[torch.Tensor]] = {}
    for batch in by_shape.values():
        for name, value in image_statistics(torch.stack(batch)).items():
            values.setdefault(name, []).append(value)
    joined = {name: torch.cat(parts).double() for name, parts in values.items()}
    return {name: Statistic(float(v.mean()), float(v.std(correction=0))) for name, v in joined.items()}


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
    kind = next((kind for magic, kind in KINDS.items() if content.startswith(magic)), None)
    if kind is None:
        raise ValueError("not shown: not a PNG, JPEG, GIF or WebP file")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _pixels(file: Path) -> torch.Tensor:
    """(3, H, W) in [0, 1]; the first frame of an animation.

    Raises:
        OSError: the file is missing or no image.
        ValueError: the image is too large to be a sample.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                array = np.array(image.convert("RGB"))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(str(error)) from error
    return rearrange(torch.from_numpy(array), "h w c -> c h w").float() / 255
