"""Rounds of any recipe on a policy of points, by the package's own functions: gather, weigh, learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from alignkit.errors import RecipeError
from alignkit.policy import Conditioning, Policy
from alignkit.rewards import Weighted
from alignkit.training.adversary import Adversary, Learns
from alignkit.training.experience import Experience, join_scores
from alignkit.training.gather import Gather
from alignkit.training.learner import Learner, numbered
from alignkit.training.recipe import Recipe
from alignkit.training.references import References
from alignkit.training.runtime import Runtime
from alignkit.training.scoring import Scoring
from alignkit.training.seeds import generator
from alignkit.types import Prompt, Rollouts, Scores
from recipes.mixture.critic import PointReferences
from recipes.mixture.policy import MixturePolicy, Points

Source = Callable[[int], list[Experience]]
"""round -> what it learns from: sampled and scored now, or `stored_samples`, or `stored_pairs`."""

UNUSED: dict[str, Any] = {"model": "mixture", "prompts": "points", "weight_decay": 0.0, "num_steps": 10}
"""Fields of every recipe here; there is no pipeline to load and no file of prompts."""


def train(
    recipe: Recipe,
    policy: MixturePolicy,
    source: Source | None = None,
    watch: Callable[[int], None] | None = None,
    references: torch.Tensor | None = None,
) -> list[dict[str, float]]:
    """All rounds of a recipe; returns their metrics.

    Args:
        source: experience from elsewhere (offline); None: the recipe samples.
        watch: called after each round with the number of rounds done.
        references: (N, 2) what the recipe's critic compares samples with, where it has one.
    """
    recipe.validate()
    trained, runtime, rewards = cast(Policy, policy), Runtime("fp32"), Weighted(recipe.rewards)
    recipe = recipe.bound(trained)
    gather = Gather(recipe, trained, Scoring(rewards), runtime, prompts(recipe.prompts_per_step), None, _go_on)
    learner = Learner(recipe, trained, runtime, _say_nothing, None, gather.anchor())
    adversary = _adversary(recipe, rewards, runtime, references)
    history: list[dict[str, float]] = []
    for step in range(recipe.steps):
        experiences = (source or gather.collect)(step)
        scores = join_scores([e.scores for e in experiences])
        groups = numbered([e.groups for e in experiences])
        weights, live = recipe.weigh(scores, rewards.weights, groups)
        metrics = {f"reward/{name}": float(part.mean()) for name, part in scores.parts.items()}
        if adversary is None or adversary.policy_trains(step):
            metrics |= learner.learn(step, experiences, weights, live, _go_on)
        if adversary is not None:
            metrics |= adversary.step(step, [(e.rollouts.x0, e.cond.prompts) for e in experiences])
        history.append(metrics)
        if watch is not None:
            watch(step + 1)
    return history


def _adversary(
    recipe: Recipe, rewards: Weighted, runtime: Runtime, references: torch.Tensor | None
) -> Adversary | None:
    if references is None or recipe.critic is None:
        return None
    critics = {name: reward for name, reward in rewards.rewards.items() if isinstance(reward, Learns)}
    if not critics:
        raise RecipeError(
            f"critic= is given and none of the rewards {', '.join(rewards.rewards)} learns; use PointCritic"
        )
    shown = cast(References, PointReferences(references))
    return Adversary(critics, recipe.critic, shown, recipe.seed, runtime, _say_nothing)


def stored_samples(recipe: Recipe, policy: MixturePolicy, x0: torch.Tensor, scores: torch.Tensor) -> Source:
    """Groups drawn from N scored points, (N, 2) and (N,)."""
    cond = points(policy, recipe.prompts_per_step, recipe.num_steps).repeat(recipe.group_size)
    groups = torch.arange(recipe.prompts_per_step).repeat_interleave(recipe.group_size)

    def drawn(step: int) -> list[Experience]:
        rows = torch.randint(len(x0), (len(cond),), generator=generator(recipe.seed, "stored", step))
        own = Scores(scores[rows], {"stored": scores[rows]})
        return [Experience(cast(Conditioning, cond), Rollouts(x0[rows], (), cond.sigmas), own, groups)]

    return drawn


def stored_pairs(recipe: Recipe, policy: MixturePolicy, winners: torch.Tensor, losers: torch.Tensor) -> Source:
    """Pairs drawn from N, both (N, 2): as many a round as the recipe samples."""
    count = recipe.prompts_per_step * recipe.group_size
    cond = points(policy, count, recipe.num_steps)

    def drawn(step: int) -> list[Experience]:
        rows = torch.randint(len(winners), (count,), generator=generator(recipe.seed, "stored", step))
        alike = Scores(torch.ones(count), {})  # the weight of a pair
        sides = Rollouts(winners[rows], (), cond.sigmas)
        return [Experience(cast(Conditioning, cond), sides, alike, torch.arange(count), losers=losers[rows])]

    return drawn


def prompts(count: int) -> list[Prompt]:
    """Prompts that say nothing; each is a group of its own."""
    return [Prompt("a point", id=i) for i in range(count)]


def points(policy: MixturePolicy, count: int, num_steps: int) -> Points:
    """A conditioning on `count` prompts."""
    return policy.condition(prompts(count), num_steps)


def _go_on() -> None:
    """Nobody asks these runs to stop."""


def _say_nothing(sentence: str) -> None:
    """The on-policy check is a test of its own."""
