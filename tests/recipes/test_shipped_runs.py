"""The shipped recipes through the real command line, and what a user does with the result in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
