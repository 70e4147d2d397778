"""Commands that draw and score pictures."""

from __future__ import annotations

import argparse

from alignkit.cli.printing import no_loading_bars, print_json, print_table
from alignkit.errors import RecipeError


def sample(args: argparse.Namespace) -> int:
    from alignkit.inference import sampling
    from alignkit.shipped import resolved

    call = dict(sampling.parse_setting(text) for text in args.set)
    loras = [sampling.parse_lora(text) for text in args.lora]
    for name in ("num", "steps"):
        if vars(args)[name] < 1:
            raise RecipeError(f"--{name} {vars(args)[name]} must be at least 1")
    no_loading_bars()
    pipe = sampling.open_pipeline(resolved(args.model))
    for path, layers in sampling.add_loras(pipe, loras).items():
        print(f"{path}: {layers} layers")
    drawn = sampling.sample(pipe, args.prompts, num=args.num, steps=args.steps, seed=args.seed, call=call)
    files = sampling.write(drawn, args.out)
    print(f"{len(drawn)} samples; contact sheet: {files[-1]}")
    return 0


def score(args: argparse.Namespace) -> int:
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
        return print_json(found)
    names = list(found[0]["scores"])
    rows = [[row["image"], *(_number(row["scores"][name]) for name in names), row["prompt"]] for row in found]
    print_table("", ["image", *names, "prompt"], rows)
    return 0


def _number(value: float | None) -> str:
    return "not applicable" if value is None else f"{value:.4f}"
