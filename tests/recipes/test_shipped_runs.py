"""The shipped recipes through the real command line, and what a user does with the result in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image, ImageSequence

SHORT = ["--steps", "1", "--eval-limit", "4", "--diversity-prompts", "0"]

FRESH = """
import sys, json
from diffusers import DiffusionPipeline
from PIL import Image
from alignkit import load_prompts, shipped
from alignkit.training.seeds import generators

run, out, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
pipe = DiffusionPipeline.from_pretrained(shipped.path("assets", "signs", "generator"))
pipe.load_lora_weights(run + "/lora")
prompts = load_prompts(shipped.path("assets", "signs", "held_out.txt"))[:count]
pictures = pipe(prompt=[str(p) for p in prompts], generator=generators(count, 0, "assess"), num_inference_steps=8,
                height=24, width=64, true_cfg_scale=1.0).images
for i, picture in enumerate(pictures):
    picture.save(f"{out}/{i:02d}.png")
"""

FRESH_CLIPS = """
import sys, torch
from diffusers import DiffusionPipeline
from alignkit import load_prompts, shipped
from alignkit.training.seeds import generators

run, out, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
pipe = DiffusionPipeline.from_pretrained(shipped.path("assets", "shapes", "generator"))
pipe.load_lora_weights(run + "/lora")
prompts = load_prompts(shipped.path("assets", "shapes", "held_out.txt"))[:count]
clips = pipe(prompt=[str(p) for p in prompts], generator=generators(count, 0, "assess"), num_inference_steps=8,
             height=32, width=32, num_frames=9, max_sequence_length=8, guidance_scale=1.0, output_type="pt").frames
torch.save(clips, out + "/clips.pt")
"""


def alignkit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alignkit", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=110)


@pytest.mark.parametrize("name", ["quickstart", pytest.param("hacking", marks=pytest.mark.slow)])
def test_a_shipped_recipe_runs_outside_the_repository(name: str, tmp_path: Path) -> None:
    done = alignkit("run", name, *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs" / name
    summary = json.loads((run / "summary.json").read_text())
    assert {"ocr", "ocr_exact"} <= summary["rewards"].keys()
    assert (run / "report.html").stat().st_size > 10_000
    titles = [grid["title"] for grid in json.loads((run / "samples" / "index.json").read_text())]
    assert titles == ["base", "base with guidance", "aligned"]
    if name == "quickstart":
        _a_fresh_process_reproduces_the_aligned_grid_with_plain_diffusers(run, tmp_path)


def _a_fresh_process_reproduces_the_aligned_grid_with_plain_diffusers(run: Path, folder: Path) -> None:
    kept = sorted((run / "samples" / "aligned").glob("*.png"))
    command = [sys.executable, "-c", FRESH, str(run), str(folder), str(len(kept))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    for file in kept:
        ours, theirs = (np.asarray(Image.open(f), dtype=float) for f in (file, folder / file.name))
        assert np.abs(ours - theirs).max() <= 2, file.name


def test_the_video_quickstart_runs_outside_the_repository_and_its_adapters_load_plainly(tmp_path: Path) -> None:
    done = alignkit("run", "video_quickstart", *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs" / "video_quickstart"
    summary = json.loads((run / "summary.json").read_text())
    assert "tracker" in summary["judges"] and "tracker" not in summary["rewards"]
    kept = sorted((run / "samples" / "aligned").glob("*.webp"))
    command = [sys.executable, "-c", FRESH_CLIPS, str(run), str(tmp_path), str(len(kept))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    for file, clip in zip(kept, torch.load(tmp_path / "clips.pt", weights_only=True), strict=True):
        frames = [frame.convert("RGB").resize((32, 32), Image.Resampling.BOX) for frame in _frames(file)]
        theirs = 255 * rearrange(clip, "t c h w -> t h w c").clamp(0, 1).numpy()
        assert np.abs(np.stack([np.asarray(frame, float) for frame in frames]) - theirs).mean() <= 2, file.name


def _frames(file: Path) -> Iterator[Image.Image]:
    return iter(ImageSequence.Iterator(Image.open(file)))
