"""Scores of pictures and videos on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageSequence, UnidentifiedImageError

from alignkit.data.frames import uniform
from alignkit.data.video import read_video
from alignkit.errors import DataError, RecipeError
from alignkit.rewards import Weighted, describe
from alignkit.types import Prompt


def read_media(file: Path, frames: int | None = None) -> torch.Tensor:
    """An image (3, H, W), or the video or animation (T, 3, H, W), float in [0, 1]; transparency is put on white.

    Args:
        frames: of a video so many, evenly spread from the first to the last; None: all.

    Raises:
        DataError: there is no such file, or it is neither an image nor a video.
        RecipeError: `frames` is not positive, or more than the video has.
    """

    def chosen(count: int) -> list[int]:
        return list(range(count)) if frames is None else uniform(count, frames)

    try:
        with Image.open(file) as opened:
            images = [_on_white(frame) for frame in ImageSequence.Iterator(opened)]
    except FileNotFoundError as error:
        raise DataError(f"there is no image or video {file} (looked from {Path.cwd()})") from error
    except UnidentifiedImageError:
        return read_video(file, chosen)
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from error
    if len(images) == 1:
        return images[0]
    return torch.stack([images[index] for index in chosen(len(images))])


def _on_white(image: Image.Image) -> torch.Tensor:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"), dtype=np.float32) / 255
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w")


def score_files(
    rewards: Sequence[str], files: Sequence[Path], prompts: Sequence[Prompt], frames: int | None = None
) -> list[dict[str, Any]]:
    """One record per image or video: file, prompt, each reward's score (None where it does not apply), the engines.

    `engines` says which engine in which version a reward reads with: two engines' scores do not compare.

    Args:
        frames: of a video so many are looked at; None: all.

    Raises:
        RecipeError: the numbers of files and prompts differ, or no reward is named.
        RewardError: a reward failed.
    """
    if len(files) != len(prompts):
        raise RecipeError(f"{len(files)} images and {len(prompts)} prompts; give one prompt for all, or one per file")
    if not rewards:
        raise RecipeError("no reward given; `alignkit rewards` lists those that have a name")
    judges = Weighted(dict.fromkeys(rewards, 1.0))
    judges.check_prompts(prompts)
    described = {name: describe(reward) for name, reward in judges.rewards.items()}
    engines = {
        name: f"{d['engine']} {d['version']}" for name, d in described.items() if {"engine", "version"} <= set(d)
    }
    records: list[dict[str, Any]] = []
    for file, prompt in zip(files, prompts, strict=True):
        parts = judges(read_media(file, frames).unsqueeze(0), [prompt]).parts
        scores = {name: None if bool(value.isnan()) else float(value) for name, value in parts.items()}
        records.append({"image": str(file), "prompt": str(prompt), "scores": scores, "engines": engines})
    return records
