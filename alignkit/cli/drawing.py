"""Commands that draw and score pictures and videos."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from alignkit.cli.printing import no_loading_bars, print_json, print_table
from alignkit.errors import RecipeError

if TYPE_CHECKING:
    from alignkit.inference.comparing import Contender


def add_guidance(parser: argparse.ArgumentParser) -> None:
    """The options of `sample` that steer it with rewards."""
    steered = parser.add_argument_group("reward guidance", "draws unguided, best of n and METHOD from the same noise")
    steered.add_argument("--guide", metavar="METHOD", help="nrg, dps, fk, das, best_of_n, search, reno; or 'fk(...)'")
    steered.add_argument(
        "--reward", action="append", default=[], metavar="SPEC[=WEIGHT]", help="may be given several times"
    )
    steered.add_argument("--judge", action="append", default=[], metavar="SPEC", help="reward that is only reported")
    steered.add_argument("--budget", type=float, help="denoiser calls over a plain sample's (default: the method's)")
    steered.add_argument("--plan", action="store_true", help="only say what it will cost; loads and draws nothing")


def sample(args: argparse.Namespace) -> int:
    from alignkit.data.video import FASTEST, SLOWEST
    from alignkit.inference import sampling

    call = dict(sampling.parse_setting(text) for text in args.set)
    loras = [sampling.parse_lora(text) for text in args.lora]
    for name in ("num", "steps", "batch"):
        if vars(args)[name] < 1:
            raise RecipeError(f"--{name} {vars(args)[name]} must be at least 1")
    if not SLOWEST <= args.fps <= FASTEST:
        raise RecipeError(f"--fps {args.fps:g} must be from {SLOWEST:g} to {FASTEST:.0f} frames per second")
    _require_guide_and_reward(args)
    if args.guide is not None:
        return _guided(args, call, loras)
    pipe = _opened(args, loras)
    drawn = sampling.sample(
        pipe, args.prompts, num=args.num, steps=args.steps, seed=args.seed, call=call, batch=args.batch
    )
    files = sampling.write(drawn, args.out, fps=args.fps)
    print(f"{len(drawn)} samples; contact sheet: {files[-1]}")
    return 0


def _require_guide_and_reward(args: argparse.Namespace) -> None:
    """Raises RecipeError where of --guide and --reward only one is given, or what goes with them alone."""
    if args.guide is not None and not args.reward:
        raise RecipeError(f"--guide {args.guide} needs a reward to follow; add --reward SPEC, for example --reward ocr")
    given = {
        "--reward": args.reward,
        "--judge": args.judge,
        "--budget": args.budget is not None,
        "--plan": args.plan,
    }
    alone = [option for option, value in given.items() if value]
    if args.guide is None and alone:
        raise RecipeError(f"{alone[0]} goes with --guide METHOD; add for example --guide best_of_n")


def _opened(args: argparse.Namespace, loras: list[tuple[str, float]]) -> Any:
    from alignkit.inference import sampling
    from alignkit.shipped import resolved

    no_loading_bars()
    pipe = sampling.open_pipeline(resolved(args.model))
    for path, layers in sampling.add_loras(pipe, loras).items():
        print(f"{path}: {layers} layers")
    return pipe


def _guided(args: argparse.Namespace, call: dict[str, Any], loras: list[tuple[str, float]]) -> int:
    from alignkit.inference import comparing, sampling
    from alignkit.inference.judges import Judges
    from alignkit.inference.side_by_side import side_by_side

    judges = Judges(comparing.weighted_specs(args.reward), args.judge)
    compared = comparing.contenders(args.guide, args.budget, args.steps)
    for one in compared:
        one.method.check_rewards(judges)
    _print_plan(args, compared)
    if args.plan:
        return 0
    drawn = {"num": args.num, "steps": args.steps, "seed": args.seed, "call": call, "batch": args.batch}
    rows = comparing.compare(_opened(args, loras), args.prompts, judges, compared, **drawn)
    print_table("means over all samples; calls, decodes and seconds per sample", *comparing.table(rows))
    files = sampling.write(rows[-1].samples, args.out, side_by_side(comparing.columns(rows)), args.fps)
    about = {"model": args.model, "lora": args.lora, "prompts": args.prompts, **drawn}
    files.append(files[-1].with_suffix(".json"))
    files[-1].write_text(json.dumps(comparing.record(rows, **about), indent=1, allow_nan=False), encoding="utf-8")
    print(f"{len(rows[-1].seeds)} samples with {rows[-1].name}; side by side: {files[-2]}; record: {files[-1]}")
    return 0


def _print_plan(args: argparse.Namespace, compared: Sequence[Contender]) -> None:
    from alignkit.inference import comparing

    print_table("plan", comparing.PLAN, comparing.costs(compared, args.steps))
    for note in comparing.memory_notes(compared[-1], args.steps, args.batch):
        print(note)
    samples = args.num * len(args.prompts)
    calls = comparing.calls_in_all(compared, args.steps, samples)
    print(f"{samples} samples with each of {len(compared)}, one before to warm up: {calls} denoiser calls in all")


def score(args: argparse.Namespace) -> int:
    from alignkit.data.prompts import load_prompts
    from alignkit.inference.scoring import score_files
    from alignkit.rewards.loading import split_specs
    from alignkit.types import Prompt

    if args.prompts is not None:
        prompts = load_prompts(args.prompts)
    else:
        prompts = [Prompt(args.prompt, id=i) for i in range(len(args.images))]
    found = score_files(split_specs(args.rewards), args.images, prompts, args.frames)
    if args.json:
        return print_json(found)
    names = list(found[0]["scores"])
    rows = [[row["image"], *(_number(row["scores"][name]) for name in names), row["prompt"]] for row in found]
    print_table("", ["image", *names, "prompt"], rows)
    return 0


def _number(value: float | None) -> str:
    return "not applicable" if value is None else f"{value:.4f}"
