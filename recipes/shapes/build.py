"""Build the generator of moving shapes, from nothing, on one CPU core.

    python recipes/shapes/build.py --out runs/shapes [--stages vae flow score] [--seed 0]

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

STAGES = ("vae", "flow", "score")
MINUTES = {"vae": 17.0, "flow": 45.0}  # of one core that is otherwise free


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
    parser.add_argument("--pairs", type=int, default=24576, help="pretraining pairs, encoded once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_prompts(args.out)
    if "vae" in args.stages:
        train_vae(args.out, args.seed, args.vae_minutes)
    if "flow" in args.stages:
        train_flow(args.out, args.seed, args.flow_minutes, args.pairs)
    if "score" in args.stages:
        results = score(args.out / "generator")
        (args.out / "score.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
