"""From the specs in a reward model's recipe to what they name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from rapidfuzz import process

from alignkit import shipped
from alignkit.errors import RecipeError
from alignkit.rewards.loading import load_file, split_options

Spec = Annotated[str | Callable[..., Any], tyro.conf.arg(constructor=str, metavar="SPEC")]
"""A callable in a recipe file; what names one on the command line."""


def made(spec: Spec, field: str) -> Any:
    """What the factory that `spec` names returns. Raises RecipeError where there is none."""
    if callable(spec):
        return spec()
    place, options = split_options(spec)
    return named(place, field)(**options)


def named(spec: Spec, field: str) -> Callable[..., Any]:
    """The callable that a spec of a recipe's `field` names.

    Raises:
        RecipeError: there is no such file, module or name.
    """
    if callable(spec):
        return spec
    place, colon, name = spec.removeprefix(shipped.PREFIX).rpartition(":")
    if not colon:
        raise RecipeError(f"{field}={spec!r} must be 'package.module:name' or 'path/file.py:name'")
    try:
        if place.endswith(".py"):
            found = load_file(Path(shipped.resolved(spec.rpartition(":")[0])))
        else:
            found = importlib.import_module(place)
    except ImportError as error:
        raise RecipeError(f"{field}={spec!r} cannot be imported: {error}") from error
    if name not in vars(found):
        own = [n for n, v in vars(found).items() if callable(v) and not n.startswith("_")]
        near = process.extractOne(name, own)
        raise RecipeError(f"{field}={spec!r}: {place} has no {name!r}" + (f"; nearest: {near[0]!r}" if near else ""))
    return vars(found)[name]
