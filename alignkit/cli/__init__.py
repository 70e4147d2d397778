"""The command line. Nothing heavy is imported before a command is known, so `alignkit --help` is instant."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignkit.cli import drawing, machine, pairs, recipes
from alignkit.errors import AlignkitError, DataError, RecipeError

USAGE_ERROR, FAILURE, STOPPED = 2, 1, 130
NO_TORCH = ("report", "doctor")
"""Commands that work even where torch and torchvision do not fit together."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failure, 2 for wrong input, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    known, rest = parser.parse_known_args(arguments)
    if rest and known.command not in ("run", "plan"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    known.overrides = rest
    known.written = ["alignkit", *arguments]
    # Its warning about C++ extensions is printed at every import; `doctor` says what it means.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    # Read when torch loads: threads that spin while they wait run many times slower on a busy machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        if known.command not in NO_TORCH:
            _require_fitting_torchvision()
        return known.handler(known)
    except AlignkitError as error:
        print(f"alignkit: {error}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, RecipeError | DataError) else FAILURE
    except OSError as error:  # no such model, no network, a full disk: their own words are good enough
        print(f"alignkit: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        print("alignkit: stopped", file=sys.stderr)
        return STOPPED


def _require_fitting_torchvision() -> None:
    from alignkit.evaluation.doctor import torch_and_torchvision

    fault = torch_and_torchvision()
    if fault is not None:
        raise AlignkitError(fault)


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options; fields of recipes are added by tyro when the recipe is known."""
    from alignkit import __version__

    parser = argparse.ArgumentParser(
        prog="alignkit", description="Align diffusers image and video pipelines with rewards.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"alignkit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, handler: Callable[[argparse.Namespace], int], text: str, **extra: Any) -> Any:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False, **extra)
        added.set_defaults(handler=handler)
        return added

    fields = "Any field of the recipe can follow, such as --lr 1e-4; `RECIPE --help` lists them."
    run = command("run", recipes.run, "train with a recipe", add_help=False, epilog=fields)
    run.add_argument("recipe", nargs="?", help="NAME, path/x.py, path/x.py:variant, or RUN/recipe.json to repeat a run")
    run.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/NAME)")
    run.add_argument("--tiny", action="store_true", help="two steps on a tiny random pipeline of the same class")

    resume = command("resume", recipes.resume, "continue a run from its last checkpoint")
    resume.add_argument("run", type=Path, metavar="RUN")

    plan = command(
        "plan", recipes.plan, "say what a recipe will do and cost; trains nothing", add_help=False, epilog=fields
    )
    plan.add_argument("recipe", nargs="?", help="NAME, path/x.py or path/x.py:variant")
    plan.add_argument("--measure", action="store_true", help="load the weights and measure a few micro-steps")
    plan.add_argument("--json", action="store_true", help="print a JSON record")

    sample = command("sample", drawing.sample, "draw samples with a pipeline and LoRA files")
    sample.add_argument("model", help="folder or hub id")
    sample.add_argument("prompts", nargs="+", metavar="PROMPT")
    sample.add_argument(
        "--lora", action="append", default=[], metavar="PATH[:SCALE]", help="may be given several times"
    )
    sample.add_argument("--num", type=int, default=4, help="samples per prompt (default: 4)")
    sample.add_argument("--steps", type=int, default=28, help="denoising steps (default: 28)")
    sample.add_argument("--seed", type=int, default=0, help="sample i of a prompt has seed SEED + i (default: 0)")
    sample.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="pipeline keywords")
    sample.add_argument("--out", type=Path, default=Path("samples"), help="folder, or a .png for the sheet alone")
    sample.add_argument("--batch", type=int, default=8, help="samples that are denoised at once (default: 8)")
    sample.add_argument("--fps", type=float, default=8.0, help="frames per second at which videos play (default: 8)")
    drawing.add_guidance(sample)

    score = command("score", drawing.score, "score images or videos with rewards")
    score.add_argument("rewards", metavar="REWARD[,REWARD]")
    score.add_argument("images", nargs="+", type=Path, metavar="FILE", help="images, animations or videos")
    score.add_argument("--frames", type=int, metavar="N", help="look at N frames of a video, evenly spread (all)")
    texts = score.add_mutually_exclusive_group(required=True)
    texts.add_argument("--prompt", help="the prompt of all files")
    texts.add_argument("--prompts", type=Path, metavar="FILE", help="prompt file, one prompt per file in order")
    score.add_argument("--json", action="store_true", help="print a JSON record")

    pairing = command("pairs", pairs.pairs, "make preference pairs: sample, rank, sift; or read published ones")
    pairs.add_options(pairing)

    fetch = command("fetch", recipes.fetch, "download all that a recipe or a reward needs: model, rewards, tokenizers")
    fetch.add_argument("what", metavar="RECIPE|REWARD")
    fetch.add_argument("--list", action="store_true", help="only say what is needed and what is here")
    fetch.add_argument("--json", action="store_true", help="print a JSON record")

    rewards = command("rewards", machine.rewards, "list the rewards that have a name, and which load here")
    rewards.add_argument("--json", action="store_true", help="print a JSON record")

    report = command("report", recipes.report, "write a run's report.html again")
    report.add_argument("run", type=Path, metavar="RUN")

    doctor = command("doctor", machine.doctor, "versions, devices, attention kernels that run, rewards that load")
    doctor.add_argument("--json", action="store_true", help="print a JSON record")

    bench = command("bench", machine.bench, "how much time and memory alignkit adds to a pipeline")
    bench.add_argument("--json", action="store_true", help="print a JSON record")
    for parsed in (run, plan):
        parsed.set_defaults(own_help=parsed.format_help)
    return parser
