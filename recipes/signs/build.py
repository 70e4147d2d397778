"""Build the sign world's generator, from nothing, on one CPU core.

    python recipes/signs/build.py --out runs/signs [--stages vae wide ...] [--seed 0]

Stages go on where an interrupted run stopped. README.md beside this file says what they cost and score. Afterwards the
text encoder learns to answer questions: `alignkit run sign_judge`, whose model/text_encoder and model/tokenizer then
take the place of the generator's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import world
from score import score
from train_flow import train_flow
from train_vae import train_vae

# flow phase -> (its data, the phase it begins from); each goes on with the averaged weights of the one before
PHASES = {
    "wide": (world.WIDE, None),
    "narrow": (world.NARROW, "wide"),
    "transposed": (world.TRANSPOSED, "narrow"),
    "final": (world.FINAL, "transposed"),
}
STAGES = ("vae", *PHASES, "score")
# of one core that is otherwise free
MINUTES = {"vae": 15.0, "wide": 45.0, "narrow": 12.0, "transposed": 7.0, "final": 12.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the generator")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    for stage, minutes in MINUTES.items():
        help_text = f"wall time of {stage}, earlier sittings counted"
        parser.add_argument(f"--{stage}-minutes", type=float, default=minutes, help=help_text)
    parser.add_argument("--pairs", type=int, default=57344, help="pretraining pairs per phase, encoded once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    minutes = {stage: vars(args)[f"{stage}_minutes"] for stage in MINUTES}
    args.out.mkdir(parents=True, exist_ok=True)
    world.write_world(args.out / "world.json")
    if "vae" in args.stages:
        train_vae(args.out, args.seed, minutes["vae"])
    for number, (phase, (variety, start)) in enumerate(PHASES.items()):
        if phase in args.stages:
            train_flow(args.out, variety, phase, start, args.seed + number, minutes[phase], args.pairs)
    if "score" in args.stages:
        results = score(args.out / "generator", args.out / "world.json")
        (args.out / "score.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
