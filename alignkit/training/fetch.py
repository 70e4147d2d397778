"""Everything that a recipe or a reward reads from the hub, listed and downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError, RecipeError
from alignkit.inference.comparison import Comparison
from alignkit.rewards import Files, load
from alignkit.rewards.card import HasWeights
from alignkit.rewards.weights import MissingWeights, locate
from alignkit.shipped import resolved
from alignkit.training.grpo import GRPO
from alignkit.training.recipe_files import AnyRecipe
from alignkit.training.reward_model import RewardModel
from alignkit.training.steered import Steered


@dataclass(frozen=True)
class Need:
    """One thing to have on disk.

    Attributes:
        what: who reads it: "model" or the name of a reward.
        files: where it is published; no patterns for a pipeline, which says itself which files it needs.
        place: the folder it is in; None while it is not on this machine.
    """

    what: str
    files: Files
    place: Path | None


def needs_of_recipe(recipe: AnyRecipe) -> list[Need]:
    """The pipeline and every reward and judge, tokenizers included. Nothing is downloaded.

    What a reward model's recipe reads, its own code knows; for such a recipe the list is empty.
    """
    if isinstance(recipe, RewardModel):
        return []
    model = resolved(recipe.model)
    needs = [Need("model", Files(model, ()), _pipeline(model, download=False))]
    if isinstance(recipe, Comparison):
        return needs + [need for spec in recipe.specs for need in needs_of_reward(spec)]
    features = recipe.diversity_shaping if isinstance(recipe, GRPO) else None
    compared = [features] if features not in (None, "pixels", *recipe.rewards) else []
    guide = recipe.guide if isinstance(recipe, Steered) else ()
    for spec in (*recipe.rewards, *recipe.judges, *compared, *guide):
        needs += needs_of_reward(spec)
    return needs


def needs_of_reward(spec: Any) -> list[Need]:
    """What one reward reads."""
    reward = load(spec)
    files = reward.files() if isinstance(reward, HasWeights) else ()
    return [Need(reward.name, one, _here(one)) for one in files]


def fetch(needs: list[Need], say: Callable[[str], None]) -> Iterator[Need]:
    """Download what is missing, one after the other.

    Raises:
        AlignkitError: the hub cannot be reached or has not what is asked for; names the hub id.
    """
    for need in needs:
        if need.place is not None:
            yield need
            continue
        say(f"downloading {need.files.source} for {need.what}")
        pipeline = need.what == "model" and not need.files.patterns
        yield Need(
            need.what, need.files, _pipeline(need.files.source, download=True) if pipeline else locate(need.files)
        )


def _here(files: Files) -> Path | None:
    try:
        return locate(files, download=False)
    except MissingWeights:
        return None


def _pipeline(model: str, download: bool) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(model, local_files_only=not download))
    except (OSError, ValueError) as error:
        if not download:
            return None
        raise AlignkitError(
            f"the pipeline {model} cannot be downloaded ({str(error).splitlines()[0]}); check the hub id, the network, "
            "and `hf auth login` where the model asks for it"
        ) from error


def needs_of(spec: str, recipe_of: Callable[[str], AnyRecipe]) -> list[Need]:
    """What a recipe (shipped name or file) or, where there is none of that name, a reward needs.

    Raises:
        RecipeError: neither a recipe nor a reward.
    """
    try:
        recipe = recipe_of(spec)
    except RecipeError as no_recipe:
        try:
            return needs_of_reward(spec)
        except RecipeError as no_reward:
            raise RecipeError(f"{spec!r} is neither a recipe ({no_recipe}) nor a reward ({no_reward})") from no_reward
    return needs_of_recipe(recipe)
