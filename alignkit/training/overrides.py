"""Overriding a recipe's fields from the command line: tyro reads the values, an unknown field is named first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import tyro
from rapidfuzz import process

from alignkit.errors import RecipeError

R = TypeVar("R")
"""A recipe: any frozen dataclass of the trainers."""

ELSEWHERE = {
    "learning_rate": "lr",
    "batch_size": "prompts_per_step",
    "num_generations": "group_size",
    "num_inference_steps": "num_steps",
    "max_steps": "steps",
    "epochs": "steps",
    "beta": "kl_beta",
    "clip_range": "clip",
    "mixed_precision": "precision",
    "rank": "train.rank",
    "lora_rank": "train.rank",
    "lora_alpha": "train.alpha",
    "guidance_scale": "call.guidance_scale",
}
"""What other tools call our fields; a name near to one of these is answered with ours."""


def fields(value: Any, prefix: str = "") -> dict[str, type]:
    """Dotted names of everything in a recipe that an option can set, nested ones too, with the type it has now."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    else:
        assert isinstance(value, Mapping)
        entries = {key: v for key, v in value.items() if isinstance(key, str)}
    found: dict[str, type] = {}
    for name, entry in entries.items():
        path = f"{prefix}{name}"
        nested = dataclasses.is_dataclass(entry) or (isinstance(entry, Mapping) and entry)
        found |= fields(entry, f"{path}.") if nested else {path: type(entry)}
    return found


def override(recipe: R, options: Sequence[str], command: str = "alignkit run RECIPE") -> R:
    """The recipe with `--field value` options applied; `--help` prints all fields with their present values.

    Raises:
        RecipeError: an option that is no field of this recipe; names the nearest one.
        SystemExit: 2 after tyro has said which field got a value of the wrong type; 0 after `--help`.
    """
    known = fields(recipe)
    for option in options:
        if option.startswith("--") and option not in ("--", "--help"):
            _require_known(option.partition("=")[0], known, type(recipe).__name__)
    return tyro.cli(tyro.conf.AvoidSubcommands[type(recipe)], default=recipe, args=list(options), prog=command)


def _require_known(option: str, known: Mapping[str, type], kind: str) -> None:
    path = option.removeprefix("--").replace("-", "_")
    parent, _, leaf = path.rpartition(".")
    positive = f"{parent}.{leaf.removeprefix('no_')}".lstrip(".")
    switched_off = leaf.startswith("no_") and known.get(positive) is bool
    same = {name.replace("-", "_"): own for name, own in known.items()}
    if path in same or switched_off or (leaf.isdigit() and same.get(parent) is tuple):  # judges.0 is a place in judges
        return
    siblings = [name for name in known if parent and name.startswith(f"{parent}.")]
    names = siblings or [*known, *ELSEWHERE]
    best = process.extractOne(path, names) or process.extractOne(leaf, names)
    near: str = ELSEWHERE.get(best[0], best[0]) if best else next(iter(known))
    hint = f"did you mean --{near.replace('_', '-')}?"
    if near not in known:
        hint = f"{near} is not in this recipe; add it to the recipe file"
    raise RecipeError(f"{kind} has no field {path!r} ({option}); {hint} `--help` after the recipe lists all fields")
