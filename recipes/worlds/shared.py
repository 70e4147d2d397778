"""What recipes that compare methods have in common: fields that do not depend on the method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from alignkit.shipped import path
from alignkit.training.grpo import GRPO
from alignkit.training.recipe_files import Source, load

SHARED = (
    *("model", "prompts", "eval_prompts", "rewards", "judges", "call", "guidance_baseline", "train"),
    *("num_steps", "eval_steps", "prompts_per_step", "group_size", "updates", "eval_every", "sample_prompts"),
)


def untimed(name: str) -> GRPO:
    """A shipped Flow-GRPO recipe, without its time limit."""
    found = load(Source(path("recipes", f"{name}.py")))
    assert isinstance(found, GRPO)
    return replace(found, time_limit=None)


def task(name: str, **changes: Any) -> dict[str, Any]:
    """Fields of that recipe for another method's; `changes` replace or add some."""
    found = untimed(name)
    return {field: getattr(found, field) for field in SHARED} | changes
