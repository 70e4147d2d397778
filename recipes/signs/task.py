"""What the recipes that compare methods have in common: the quickstart's model, prompts, rewards and assessments."""

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
"""Fields of the quickstart that do not depend on the method."""
GUIDE = {"legibility": 1.0, "colour": 0.5}
"""What methods that learn from the head on noised latents ask it for, weighted as OCR and colour are."""


def quickstart() -> GRPO:
    """The shipped quickstart's recipe, without its time limit."""
    found = load(Source(path("recipes", "quickstart.py")))
    assert isinstance(found, GRPO)
    return replace(found, time_limit=None)


def task(**changes: Any) -> dict[str, Any]:
    """Fields for another method's recipe; `changes` replace or add some."""
    found = quickstart()
    return {name: getattr(found, name) for name in SHARED} | changes
