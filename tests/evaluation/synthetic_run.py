"""A run directory as training writes it, made up: what the report is shown and tested on.

`python -m tests.evaluation.synthetic_run DIR [hacking]` writes one and its report.
"""

from __future__ import annotations

import json
import sys
from math import exp
from pathlib import Path
from random import Random

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

WORDS = ("CAT", "MAP", "SUN", "BOX", "TEA", "OWL", "JAM", "KEY")
COLOURS = {"blue": (40, 80, 190), "red": (190, 40, 40), "green": (30, 140, 70), "purple": (120, 50, 150)}


def write_run(folder: Path, hacking: bool = False, steps: int = 60) -> Path:
    """Everything a finished run leaves but the report; with `hacking` the colour falls while OCR rises."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(0)
    colour_after = 0.72 if hacking else 0.98
    _write(folder / "recipe.json", {"name": "hacking" if hacking else "quickstart", "lr": 1e-3, "group_size": 8})
    env = {
        "versions": {"torch": "2.15.0", "diffusers": "0.42.1", "rapidocr": "3.10.0"},
        "device": "cpu",
        "threads": 2,
        "command": ["alignkit", "run", "hacking" if hacking else "quickstart"],
    }
    _write(folder / "env.json", env)
    _write(folder / "summary.json", _summary(hacking, colour_after))
    lines = [json.dumps(row) for row in _metrics(rng, steps, colour_after)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_samples(folder / "samples", rng, hacking)
    return folder


def _summary(hacking: bool, colour_after: float) -> dict:
    rewards = {"ocr": {"before": 0.652, "after": 0.951}}
    judges = {"exact": {"before": 0.371, "after": 0.876}, "tesseract": {"before": 0.371, "after": 0.835}}
    colour = {"color": {"before": 0.99, "after": colour_after}}
    parts = {"brightness": (0.039, 0.033), "position": (0.021, 0.013), "shape": (0.82, 0.71), "colour": (0.01, 0.011)}
    right = {"brightness": (0.038, 0.035), "position": (0.02, 0.017), "shape": (0.8, 0.5), "colour": (0.01, 0.011)}
    return {
        "recipe": "FlowGRPO",
        "seed": 0,
        "held_out_prompts": 97,
        "train_seconds": 102.9,
        "wall_seconds": 137.4,
        "rewards": rewards if hacking else rewards | colour,
        "judges": judges | colour if hacking else judges,
        "diversity": {
            "before": 0.131,
            "after": 0.072,
            "parts": {name: {"before": b, "after": a} for name, (b, a) in parts.items()},
        },
        "diversity_right": {
            "before": 0.074,
            "after": 0.066,
            "parts": {name: {"before": b, "after": a} for name, (b, a) in right.items()},
        },
        "baselines": {"guidance": {"ocr": 0.83, "exact": 0.73, "tesseract": 0.71, "color": 0.99}},
        "own_scheduler": {
            "ocr": {"before": 0.648, "after": 0.944},
            "exact": {"before": 0.36, "after": 0.86},
            "color": {"before": 0.99, "after": colour_after},
        },
    }


def _metrics(rng: Random, steps: int, colour_after: float) -> list[dict]:
    rows = []
    for step in range(steps + 1):
        done = 1 - exp(-3 * step / steps)
        row: dict = {"step": step}
        if step:
            row["reward/ocr"] = 0.66 + 0.27 * done + rng.gauss(0, 0.025)
            row["reward/total"] = row["reward/ocr"] + 0.5
            row["policy/kl"] = 0.004 * done * (1 + rng.random() / 4)
            row["policy/ratio_first_dev"] = 2e-7 * rng.random()
            row["policy/ratio_max_dev"] = 4e-4 * (1 + rng.random())
            row["policy/clip_low"], row["policy/clip_high"] = 0.01 * rng.random(), 0.01 * rng.random()
            row["policy/grad_norm"] = 0.5 + rng.random() / 4
            row["groups/zero_std_fraction"] = 0.1 + 0.4 * done
            row["time/step_seconds"] = 1.5 + rng.random() / 5
        if step % 20 == 0:
            row["heldout/ocr"] = 0.652 + 0.3 * done
            row["heldout/exact"] = 0.371 + 0.5 * done
            row["heldout/color"] = 0.99 + (colour_after - 0.99) * done
        rows.append(row)
    return rows


def _write_samples(folder: Path, rng: Random, hacking: bool) -> None:
    models = (("base", "no guidance", 0.4), ("base with guidance", "true_cfg_scale 3", 0.7), ("aligned", "", 0.95))
    grids = []
    for title, note, success in models:
        images = []
        for i, word in enumerate(WORDS):
            asked = list(COLOURS)[i % len(COLOURS)]
            drawn = list(COLOURS)[(i + 1) % len(COLOURS)] if hacking and title == "aligned" and i % 3 == 0 else asked
            right = rng.random() < success
            text = word if right else word[:-1] + rng.choice("QXZ")
            name = f"{title.replace(' ', '-')}/{i:02}.png"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            sign(text, COLOURS[drawn], rng).save(folder / name)
            reads = {"rapidocr": text, "tesseract": text if rng.random() < 0.9 else "", "color": drawn}
            prompt = f'a {asked} sign that says "{word}"'
            images.append({"file": name, "prompt": prompt, "reads": reads, "right": right and drawn == asked})
        grids.append({"title": title, "note": note, "images": images})
    _write(folder / "index.json", grids)


def sign(text: str, colour: tuple[int, int, int], rng: Random) -> Image.Image:
    """64 x 32 pixels."""
    shade = rng.uniform(0.8, 1.2)
    image = Image.new("RGB", (64, 32), tuple(min(255, int(c * shade)) for c in colour))
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono:bold"), 20)
    ImageDraw.Draw(image).text((12 + rng.randint(-2, 2), 4 + rng.randint(-2, 2)), text, fill=(245, 245, 240), font=font)
    return image


def _write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    from alignkit.evaluation.report import write_report

    print(write_report(write_run(Path(sys.argv[1]), hacking="hacking" in sys.argv[2:])))
