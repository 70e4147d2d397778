"""Scores of pictures and videos on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.functional import pil_to_tensor

from alignkit.data.frames import uniform
from alignkit.data.media import UNREADABLE, load_animation
from alignkit.data.video import read_video, refuse_many
from alignkit.errors import DataError, RecipeError
from alignkit.rewards import Weighted, describe
from alignkit.types import Prompt


def read_media(file: Path, frames: int | None = None) -> torch.Tensor:
    """An image (3, H, W), or the video or animation (T, 3, H, W), float in [0, 1]; transparency is put on white.

    Args:
        frames: of a video so many, evenly spread from the first to the last; None: all.

    Raises:
        DataError: there is no such file, or it is neither an image nor a video, or too large.
        RecipeError: `frames` is not positive, or more than the video has.
    """

    def chosen(count: int) -> list[int]:
        return list(range(count)) if frames is None else uniform(count, frames)

    def of_picture(count: int, pixels: int) -> list[int]:
        indices = [0] if count == 1 else chosen(count)
        refuse_many(file, len(indices), pixels)
        return indices

    if not file.exists():
        raise DataError(f"there is no image or video {file} (looked from {Path.cwd()})")
    if not _is_picture(file):
        return read_video(file, chosen)
    images, moves = load_animation(file, of_picture)
    pixels = torch.stack([pil_to_tensor(one) for one in images]).float() / 255
    return pixels if moves else pixels[0]


def _is_picture(file: Path) -> bool:
    """Whether Pillow knows the type; whether it can be read is another question."""
    if file.is_dir():
        return False
    try:
        with Image.open(file):
            return True
    except UnidentifiedImageError:
        return False
    except (*UNREADABLE, Image.DecompressionBombError):
        return True


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
