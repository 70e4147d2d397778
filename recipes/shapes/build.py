"""Build the generator of moving shapes, from nothing, on one CPU core.

    python recipes/shapes/build.py --out runs/shapes [--stages vae clean ...] [--seed 0]

Stages go on where an interrupted run stopped. README.md beside this file says what they cost and score.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import world
from score import score
from train_flow import train_flow
from train_vae import train_vae

# flow phase -> (its data, the phase it begins from); the second goes on with the averaged weights of the first
PHASES = {"clean": (world.NONE, None), "crawl": (world.PRETRAINING, "clean")}
STAGES = ("vae", *PHASES, "score")
MINUTES = {"vae": 31.0, "clean": 22.0, "crawl": 14.0}  # of one core that is otherwise free


def write_prompts(out: Path) -> None:
    """Write world.json, train.txt and held_out.txt."""
    world.write_world(out / "world.json")
    for name, prompts in zip(("train", "held_out"), world.split_prompts(), strict=True):
        (out / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the generator")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    for stage, minutes in MINUTES.items():
        help_text = f"wall time of {stage}, earlier sittings counted"
        parser.add_argument(f"--{stage}-minutes", type=float, default=minutes, help=help_text)
    parser.add_argument("--pairs", type=int, default=8192, help="pretraining pairs per phase, encoded once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_prompts(args.out)
    if "vae" in args.stages:
        train_vae(args.out, args.seed, args.vae_minutes)
    for number, (phase, (faults, start)) in enumerate(PHASES.items()):
        if phase in args.stages:
            minutes = vars(args)[f"{phase}_minutes"]
            train_flow(args.out, faults, phase, start, args.seed + number, minutes, args.pairs)
    if "score" in args.stages:
        results = score(args.out / "generator")
        (args.out / "score.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
