"""Scores of pictures on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, UnidentifiedImageError

from alignkit.errors import DataError, RecipeError
from alignkit.rewards import Weighted, describe
from alignkit.types import Prompt


def read_image(file: Path) -> torch.Tensor:
    """(3, H, W) float in [0, 1]; transparency is put on white.

    Raises:
        DataError: there is no such file, or it is no picture.
    """
    try:
        with Image.open(file) as opened:
            rgba = opened.convert("RGBA")
    except FileNotFoundError as error:
        raise DataError(f"there is no image {file} (looked from {Path.cwd()})") from error
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from error
    white = Image.new("RGBA", rgba.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"), dtype=np.float32) / 255
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w")


def score_files(rewards: Sequence[str], files: Sequence[Path], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """One record per picture: file, prompt, the score of each reward (None where it does not apply), and the engines.

    `engines` says which engine in which version a reward reads with: two engines' scores do not compare.

    Raises:
        RecipeError: the numbers of pictures and prompts differ, or no reward is named.
        RewardError: a reward failed.
    """
    if len(files) != len(prompts):
        raise RecipeError(f"{len(files)} images and {len(prompts)} prompts; give one prompt for all, or one per image")
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
        parts = judges(read_image(file)[None], [prompt]).parts
        scores = {name: None if bool(value.isnan()) else float(value) for name, value in parts.items()}
        records.append({"image": str(file), "prompt": str(prompt), "scores": scores, "engines": engines})
    return records
