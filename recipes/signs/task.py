"""What the recipes that compare methods have in common: the quickstart's model, prompts, rewards and assessments."""

from __future__ import annotations

from typing import Any

from alignkit.rewards.loading import load_file
from alignkit.shipped import path
from alignkit.training.grpo import GRPO

shared = load_file(path("recipes", "worlds", "shared.py"))

GUIDE = {"legibility": 1.0, "colour": 0.5}
"""What methods that learn from the head on noised latents ask it for, weighted as OCR and colour are."""


def quickstart() -> GRPO:
    """The shipped quickstart's recipe, without its time limit."""
    return shared.untimed("quickstart")


def task(**changes: Any) -> dict[str, Any]:
    """Fields for another method's recipe; `changes` replace or add some."""
    return shared.task("quickstart", **changes)
