"""Commands around a recipe: run, resume, plan, fetch, report."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.cli.printing import no_loading_bars, print_json, print_table
from alignkit.errors import RecipeError

if TYPE_CHECKING:
    from alignkit.training.recipe_files import AnyRecipe, Source


def run(args: argparse.Namespace) -> int:
    if _asks_for_help(args):
        return 0
    from alignkit.training.run import start

    recipe, source, name = _recipe(args)
    no_loading_bars()
    out = args.out
    if args.tiny:
        from alignkit.training.tiny import tiny

        out = out or Path(tempfile.mkdtemp(prefix="alignkit-tiny-"))
        recipe = tiny(recipe, out)
    start(recipe, out or Path("runs") / name, source, args.written)
    return 0


def resume(args: argparse.Namespace) -> int:
    from alignkit.training import run as runs

    no_loading_bars()
    runs.resume(args.run, args.written)
    return 0


def plan(args: argparse.Namespace) -> int:
    if _asks_for_help(args):
        return 0
    from alignkit.training import planning

    recipe, _, _ = _recipe(args)
    record = planning.plan(recipe)
    if args.measure:
        no_loading_bars()
        record = planning.measured(record, recipe)
    if args.json:
        return print_json(record)
    print_table(f"alignkit plan {args.recipe}", (), list(planning.lines(record)))
    return 0


def fetch(args: argparse.Namespace) -> int:
    from alignkit.training import fetch as fetching
    from alignkit.training import recipe_files

    needs = fetching.needs_of(args.what, lambda spec: recipe_files.load(recipe_files.find(spec)))
    if not args.list:
        needs = list(fetching.fetch(needs, lambda line: print(line, file=sys.stderr)))
    if args.json:
        return print_json([{"for": n.what, "source": n.files.source, "place": n.place and str(n.place)} for n in needs])
    rows = [[n.what, n.files.source, " ".join(n.files.patterns), str(n.place or "not here")] for n in needs]
    print_table("", ["for", "source", "files", "place"], rows)
    return 0


def report(args: argparse.Namespace) -> int:
    if not (args.run / "recipe.json").is_file():
        raise RecipeError(f"{args.run} has no recipe.json; give the folder of a run, such as runs/quickstart")
    if json.loads((args.run / "recipe.json").read_text(encoding="utf-8"))["recipe"].get("class") == "Comparison":
        from alignkit.inference.comparison_report import write

        print(write(args.run))
        return 0
    from alignkit.evaluation.report import write_report

    print(write_report(args.run))
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


def _recipe(args: argparse.Namespace) -> tuple[AnyRecipe, Source | None, str]:
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
