"""The reference images that prompts name in a column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch.nn import functional as F

from alignkit.data.media import load_image
from alignkit.errors import RewardError
from alignkit.types import Prompt

COLUMN = "reference"


def references_of(prompt: Prompt, column: str = COLUMN) -> Mapping[object, Path | torch.Tensor]:
    """The references of a prompt, by a key that is equal for the same file or the same tensor.

    Raises:
        RewardError: the column is missing or empty, a file is not there, or it holds something else than paths and
            tensors (3, H, W).
    """
    value = prompt.columns.get(column)
    found: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    where = f"prompt {prompt.id} (its line or row in the prompt file) {str(prompt)!r}"
    if value is None or not found:
        raise RewardError(
            f"{where} has no column {column!r}; it names the reference image, as a path or a tensor. Columns found: "
            f"{', '.join(sorted(prompt.columns)) or 'none'}"
        )
    for one in found:
        if isinstance(one, Path) and not one.is_file():
            raise RewardError(f"{where}: its {column} {one} is not there")
        if isinstance(one, torch.Tensor) and (one.ndim != 3 or one.shape[0] != 3 or not one.is_floating_point()):
            raise RewardError(
                f"{where}: its {column} is a tensor {tuple(one.shape)} of {one.dtype}; expected (3, H, W), float in "
                "[0, 1]"
            )
        if not isinstance(one, (Path, torch.Tensor)):
            raise RewardError(
                f"{where}: its {column} is {type(one).__name__} {one!r}; expected a pathlib.Path or a tensor. Prompt "
                "files make paths of the columns that name files"
            )
    return {one if isinstance(one, Path) else id(one): one for one in found}


def image_tensor(value: Path | torch.Tensor | Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in [0, 1] of a file, an image, or a tensor, which stays as it is.

    Raises:
        DataError: the file is no image.
    """
    if isinstance(value, torch.Tensor):
        return value.float()
    image = load_image(value) if isinstance(value, Path) else value
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w").float() / 255


def fit(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(3, height, width) of (3, H, W): the largest centred part with that aspect ratio, resized (bicubic, antialias).

    A reference in another size or shape would differ from what is compared with it by that alone.
    """
    if image.shape[-2:] == (height, width):
        return image
    scale = min(image.shape[-2] / height, image.shape[-1] / width)
    rows, columns = max(round(height * scale), 1), max(round(width * scale), 1)
    top, left = (image.shape[-2] - rows) // 2, (image.shape[-1] - columns) // 2
    part = image[:, top : top + rows, left : left + columns].unsqueeze(0)
    resized = F.interpolate(part, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized.squeeze(0).clamp(0, 1)
