"""The samples of a run on clips, made up: a bright disc on dark ground that moves, stands still, or flickers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import repeat

from alignkit.evaluation.clips import write_clip
from alignkit.inference.sampling import Sample, contact_sheet

SIDE, FRAMES, SCALE = 32, 9, 4
PROMPTS = ("a red disc moves right", "a red disc moves left", "a red disc rises", "a red disc falls")
DIRECTIONS = ((1.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 1.0))


def disc(speed: tuple[float, float], flicker: float = 0.0, texture: float = 0.02, seed: int = 0) -> torch.Tensor:
    """(9, 3, 32, 32) in [0, 1]: a disc that moves by `speed` pixels per frame, (x, y).

    Args:
        flicker: how much of its brightness a frame may lose.
        texture: of the ground, new in every frame.
    """
    rng = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    ground = 0.2 + texture * torch.rand(FRAMES, SIDE, SIDE, generator=rng)
    red, others = ground.clone(), ground.clone()
    for k in range(FRAMES):
        step = k - FRAMES // 2
        x, y = (SIDE / 2 + one * step for one in speed)
        inside = (5.5 - torch.hypot(columns - x, rows - y)).clamp(0, 1)
        red[k] += 0.6 * inside
        others[k] -= 0.1 * inside
    light = 1 - flicker * torch.rand(FRAMES, generator=rng)
    return torch.stack([red, others, others], dim=1) * repeat(light, "t -> t 1 1 1")


def write_samples(samples: Path, base: Sequence[torch.Tensor], aligned: Sequence[torch.Tensor]) -> None:
    """Two grids of the same prompts, one clip each, as a run writes them."""
    grids = []
    for title, clips in (("base", base), ("aligned", aligned)):
        (samples / title).mkdir(parents=True, exist_ok=True)
        files = [write_clip(samples / title / f"{i:02}", clip, 8.0, SCALE) for i, clip in enumerate(clips)]
        images = [
            {"file": f"{title}/{file.name}", "scale": SCALE, "prompt": prompt}
            for file, prompt in zip(files, PROMPTS, strict=True)
        ]
        contact_sheet([Sample(p, 0, c) for p, c in zip(PROMPTS, clips, strict=True)]).save(
            samples / title / "sheet.png"
        )
        grids.append({"title": title, "note": "", "images": images, "sheet": f"{title}/sheet.png"})
    (samples / "index.json").write_text(json.dumps(grids), encoding="utf-8")


def discs(speed: float, flicker: float = 0.0, texture: float = 0.02) -> list[torch.Tensor]:
    """One clip for each of `PROMPTS`."""
    return [disc((speed * x, speed * y), flicker, texture, seed) for seed, (x, y) in enumerate(DIRECTIONS)]
