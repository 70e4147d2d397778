"""Groups worth training on again, for rewards so sparse that most groups of a round agree (SSB, 2504.16656)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from alignkit.errors import RecipeError

T = TypeVar("T")


@dataclass(frozen=True)
class Kept(Generic[T]):
    """One stored group: when it was sampled, and its mean absolute advantage."""

    item: T
    step: int
    weight: float


class SelectiveBuffer(Generic[T]):
    """Past groups with a signal, drawn in proportion to |advantage| when a round has too few of its own.

    Args:
        capacity: groups kept; the oldest leave first.
        rounds: staleness bound: a group of round s may be used up to round s + rounds. What it was sampled with is
            `rounds` updates old at most, which the ratio's clip has to bridge.

    Attributes:
        kept: in the order they came; all the state there is.
    """

    def __init__(self, capacity: int, rounds: int) -> None:
        if capacity < 1 or rounds < 1:
            raise RecipeError(f"a buffer of {capacity} groups for {rounds} rounds keeps nothing; both at least 1")
        self.capacity, self.rounds = capacity, rounds
        self.kept: list[Kept[T]] = []

    def add(self, items: Sequence[T], weights: Sequence[float], step: int) -> None:
        """Keep the groups of round `step` whose weight (mean |advantage|) is above 0."""
        fresh = [Kept(i, step, float(w)) for i, w in zip(items, weights, strict=True) if w > 0]
        self.kept = [*self._usable(step), *fresh][-self.capacity :]

    def draw(self, count: int, step: int, rng: torch.Generator) -> list[Kept[T]]:
        """At most `count` different groups for round `step`, with probability proportional to their weight."""
        usable = self._usable(step)
        if count < 1 or not usable:
            return []
        weights = torch.tensor([k.weight for k in usable], dtype=torch.float64)
        chosen = torch.multinomial(weights, min(count, len(usable)), generator=rng)
        return [usable[i] for i in chosen.tolist()]

    def _usable(self, step: int) -> list[Kept[T]]:
        return [k for k in self.kept if step - k.step <= self.rounds]
