"""The command line. Nothing heavy is imported before a command is known, so `alignkit --help` is instant."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import AlignkitError, DataError, RecipeError

if TYPE_CHECKING:
    from alignkit.training.recipe import Recipe
    from alignkit.training.recipe_files import Source

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


def _no_loading_bars() -> None:
    """Bars of diffusers and transformers belong into a terminal, not into a log file."""
    if sys.stderr.isatty():
        return
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


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
    run = command("run", _run, "train with a recipe", add_help=False, epilog=fields)
    run.add_argument("recipe", nargs="?", help="NAME, path/x.py, path/x.py:variant, or RUN/recipe.json to repeat a run")
    run.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/NAME)")
    run.add_argument("--tiny", action="store_true", help="two steps on a tiny random pipeline of the same class")

    resume = command("resume", _resume, "continue a run from its last checkpoint")
    resume.add_argument("run", type=Path, metavar="RUN")

    plan = command("plan", _plan, "say what a recipe will do and cost; trains nothing", add_help=False, epilog=fields)
    plan.add_argument("recipe", nargs="?", help="NAME, path/x.py or path/x.py:variant")
    plan.add_argument("--measure", action="store_true", help="load the weights and measure a few micro-steps")
    plan.add_argument("--json", action="store_true", help="print a JSON record")

    sample = command("sample", _sample, "draw samples with a pipeline and LoRA files")
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

    score = command("score", _score, "score images with rewards")
    score.add_argument("rewards", metavar="REWARD[,REWARD]")
    score.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    texts = score.add_mutually_exclusive_group(required=True)
    texts.add_argument("--prompt", help="the prompt of all images")
    texts.add_argument("--prompts", type=Path, metavar="FILE", help="prompt file, one prompt per image in order")
    score.add_argument("--json", action="store_true", help="print a JSON record")

    fetch = command("fetch", _fetch, "download all that a recipe or a reward needs: model, rewards, tokenizers")
    fetch.add_argument("what", metavar="RECIPE|REWARD")
    fetch.add_argument("--list", action="store_true", help="only say what is needed and what is here")
    fetch.add_argument("--json", action="store_true", help="print a JSON record")

    rewards = command("rewards", _rewards, "list the rewards that have a name, and which load here")
    rewards.add_argument("--json", action="store_true", help="print a JSON record")

    report = command("report", _report, "write a run's report.html again")
    report.add_argument("run", type=Path, metavar="RUN")

    doctor = command("doctor", _doctor, "versions, devices, attention kernels that run, rewards that load")
    doctor.add_argument("--json", action="store_true", help="print a JSON record")

    bench = command("bench", _bench, "how much time and memory alignkit adds to a pipeline")
    bench.add_argument("--json", action="store_true", help="print a JSON record")
    for parsed in (run, plan):
        parsed.set_defaults(own_help=parsed.format_help)
    return parser


# training


def _run(args: argparse.Namespace) -> int:
    if _asks_for_help(args):
        return 0
    from alignkit.training.run import start

    recipe, source, name = _recipe(args)
    _no_loading_bars()
    out = args.out
    if args.tiny:
        from alignkit.training.tiny import tiny

        out = out or Path(tempfile.mkdtemp(prefix="alignkit-tiny-"))
        recipe = tiny(recipe, out)
    start(recipe, out or Path("runs") / name, source, args.written)
    return 0


def _resume(args: argparse.Namespace) -> int:
    from alignkit.training.run import resume

    _no_loading_bars()
    resume(args.run, args.written)
    return 0


def _plan(args: argparse.Namespace) -> int:
    if _asks_for_help(args):
        return 0
    from alignkit.training import planning

    recipe, _, _ = _recipe(args)
    record = planning.plan(recipe)
    if args.measure:
        _no_loading_bars()
        record = planning.measured(record, recipe)
    if args.json:
        return _print_json(record)
    _print_table(f"alignkit plan {args.recipe}", (), list(planning.lines(record)))
    return 0


def _asks_for_help(args: argparse.Namespace) -> bool:
    """Without a recipe `-h` shows the command's options; after a recipe tyro shows that recipe's fields."""
    wanted = any(option in ("-h", "--help") for option in args.overrides)
    if args.recipe is None:
        if not wanted:
            raise RecipeError(f"`alignkit {args.command}` needs a recipe: a shipped NAME or a .py file")
        print(args.own_help())
        return True
    return False


def _recipe(args: argparse.Namespace) -> tuple[Recipe, Source | None, str]:
    """The recipe with its overrides, the file it is from, and the name of its runs."""
    from alignkit.training import recipe_files
    from alignkit.training.overrides import override

    spec = Path(args.recipe)
    if spec.name == "recipe.json":
        recipe, source = recipe_files.reload(spec.parent)
        name = f"{spec.resolve().parent.name}-again"
    else:
        source = recipe_files.find(args.recipe)
        recipe, name = recipe_files.load(source), source.name
    return override(recipe, args.overrides, f"alignkit {args.command} {args.recipe}"), source, name


def _report(args: argparse.Namespace) -> int:
    if not (args.run / "recipe.json").is_file():
        raise RecipeError(f"{args.run} has no recipe.json; give the folder of a run, such as runs/quickstart")
    from alignkit.evaluation.report import write_report

    print(write_report(args.run))
    return 0


# drawing and scoring


def _sample(args: argparse.Namespace) -> int:
    from alignkit.inference import sampling
    from alignkit.training.recipe_files import resolved

    call = dict(sampling.parse_setting(text) for text in args.set)
    loras = [sampling.parse_lora(text) for text in args.lora]
    for name in ("num", "steps"):
        if vars(args)[name] < 1:
            raise RecipeError(f"--{name} {vars(args)[name]} must be at least 1")
    _no_loading_bars()
    pipe = sampling.open_pipeline(resolved(args.model))
    for path, layers in sampling.add_loras(pipe, loras).items():
        print(f"{path}: {layers} layers")
    drawn = sampling.sample(pipe, args.prompts, num=args.num, steps=args.steps, seed=args.seed, call=call)
    files = sampling.write(drawn, args.out)
    print(f"{len(drawn)} samples; contact sheet: {files[-1]}")
    return 0


def _score(args: argparse.Namespace) -> int:
    from alignkit.data.prompts import load_prompts
    from alignkit.inference.scoring import score_files
    from alignkit.rewards.loading import split_specs
    from alignkit.types import Prompt

    if args.prompts is not None:
        prompts = load_prompts(args.prompts)
    else:
        prompts = [Prompt(args.prompt, id=i) for i in range(len(args.images))]
    found = score_files(split_specs(args.rewards), args.images, prompts)
    if args.json:
        return _print_json(found)
    names = list(found[0]["scores"])
    rows = [[row["image"], *(_number(row["scores"][name]) for name in names), row["prompt"]] for row in found]
    _print_table("", ["image", *names, "prompt"], rows)
    return 0


def _number(value: float | None) -> str:
    return "not applicable" if value is None else f"{value:.4f}"


# what there is


def _fetch(args: argparse.Namespace) -> int:
    from alignkit.training import recipe_files
    from alignkit.training.fetch import fetch, needs_of

    needs = needs_of(args.what, lambda spec: recipe_files.load(recipe_files.find(spec)))
    if not args.list:
        needs = list(fetch(needs, lambda line: print(line, file=sys.stderr)))
    if args.json:
        return _print_json(
            [{"for": n.what, "source": n.files.source, "place": n.place and str(n.place)} for n in needs]
        )
    rows = [[n.what, n.files.source, " ".join(n.files.patterns), str(n.place or "not here")] for n in needs]
    _print_table("", ["for", "source", "files", "place"], rows)
    return 0


def _rewards(args: argparse.Namespace) -> int:
    from alignkit.evaluation.doctor import rewards

    found = rewards()
    if args.json:
        return _print_json(found)
    rows = [
        [
            r["name"],
            r["family"],
            r["kind"],
            "yes" if r["differentiable"] else "no",
            r["range"],
            r["status"],
            r["summary"],
        ]
        for r in found
    ]
    _print_table("", ["reward", "family", "scores", "differentiable", "range", "status", "a high score means"], rows)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from alignkit.evaluation.doctor import examine

    record = examine()
    if args.json:
        return _print_json(record)
    _print_table("versions", (), [[name, found or "not installed"] for name, found in record["versions"].items()])
    for device in record["devices"] or ():
        print(f"device {device['device']}: {device['name']}")
    if record["attention"] is not None:
        rows = [
            [one["backend"], _yes(one["forward"]), _yes(one["backward"]), ", ".join(one["kernels"]) or one["note"]]
            for one in record["attention"]
        ]
        title = f"attention on {record['attention'][0]['device']}"
        _print_table(title, ["backend", "forward", "backward", "kernel that ran, or why not"], rows)
    if record["rewards"] is not None:
        _print_table("rewards", ["reward", "status"], [[r["name"], r["status"]] for r in record["rewards"]])
    print(f"tesseract: {record['tesseract'] or 'not installed'}")
    if record["threads"] is not None:
        print(f"threads: {record['threads']['torch_threads']} on {record['threads']['cpus']} CPUs")
    for problem in record["problems"]:
        print(f"! {problem}")
    return FAILURE if record["attention"] is None else 0


def _yes(ran: bool) -> str:
    return "runs" if ran else "-"


def _bench(args: argparse.Namespace) -> int:
    from alignkit.training.benchmark import bench, lines

    _no_loading_bars()
    record = bench()
    if args.json:
        return _print_json(record)
    _print_table("alignkit bench", (), list(lines(record)))
    return 0


# printing


def _print_json(record: Any) -> int:
    print(json.dumps(record, indent=1, allow_nan=False))
    return 0


def _print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table in a terminal, lines with tabs elsewhere, so that other programs can read them."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        for row in ([header] if header else []) + list(rows):
            print("\t".join(str(cell) for cell in row))
        return
    table = Table(title=title or None, show_header=bool(header), title_justify="left")
    rows = list(rows)
    for name in header or [""] * len(rows[0]):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(_escaped(str(cell)) for cell in row))
    console.print(table)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    sys.exit(main())
