"""What a run loads before it begins: prompts, judges, the policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from diffusers import DiffusionPipeline

from alignkit.data.prompts import load_prompts, split
from alignkit.errors import RecipeError
from alignkit.policy import Policy
from alignkit.rewards.loading import unavailable
from alignkit.shipped import resolved
from alignkit.training.offline import OfflineData
from alignkit.training.recipe import Recipe, RewardSpec
from alignkit.training.runtime import Runtime
from alignkit.types import Prompt


def available(judges: Sequence[RewardSpec], say: Callable[[str], None]) -> list[RewardSpec]:
    """The judges that can load here; one that cannot is left out with a sentence, since nothing is trained on it."""
    found = []
    for judge in judges:
        if isinstance(judge, str) and (reason := unavailable(judge)):
            say(f"judge {judge!r} is left out: {reason}")
        else:
            found.append(judge)
    return found


def data_of(recipe: Recipe) -> OfflineData | None:
    """What the recipe learns from, where it does not sample."""
    if recipe.data is None or recipe.learns_from == "rollouts":
        return None
    return read_data(recipe.data, recipe.learns_from)


def read_data(path: str, kind: Literal["samples", "pairs"]) -> OfflineData:
    """A file of pairs or scored samples."""
    return OfflineData(resolved(path), kind)


def prompts_of(recipe: Recipe, data: OfflineData | None) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts; held out of the data's own where the recipe names no others."""
    if data is None:
        assert recipe.prompts is not None
        prompts = load_prompts(resolved(recipe.prompts))
    else:
        prompts = data.prompts
    if recipe.eval_prompts is None:
        prompts, held_out = split(prompts, seed=recipe.seed)
    else:
        held_out = load_prompts(resolved(recipe.eval_prompts))
    return prompts, held_out[: recipe.eval_limit]


def policy_of(recipe: Recipe, runtime: Runtime) -> Policy:
    """The recipe's pipeline on this process's device, with its trained weights.

    Raises:
        RecipeError: a folder without a pipeline in it.
    """
    model = resolved(recipe.model)
    if model.count("/") != 1 and not (Path(model) / "model_index.json").is_file():
        raise RecipeError(
            f"model={recipe.model!r} is no folder with a model_index.json (looked from {Path.cwd()}), and hub ids have "
            "one slash"
        )
    pipe = DiffusionPipeline.from_pretrained(model, dtype=runtime.dtype).to(runtime.device)
    policy = Policy(pipe, recipe.train, init_lora=recipe.init_lora, attention=recipe.attention)
    policy.set_decoding(recipe.decode)
    return policy
