"""Runs of several samples of each prompt: whole ones, and ones that are judged on the way.

A slot is one sample of every one of P prompts; several slots are denoised at once, as many as a task's batch holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from alignkit.flow.path import x0_from_velocity
from alignkit.flow.plan import deterministic
from alignkit.inference.task import Found, Task, pieces_of, streams
from alignkit.types import Step

Slot = list[torch.Generator]


@dataclass(frozen=True)
class Group:
    """Runs that enter the same step.

    Attributes:
        slots: n, with the generators of P samples each.
        latents: (n, P, ...) what enters step `start`; None: the pipeline's first latents.
        start: step.
    """

    slots: list[Slot]
    latents: Tensor | None = None
    start: int = 0


def by_slot(rng: Sequence[torch.Generator], count: int) -> list[Slot]:
    """`count` slots; slot i of a prompt is the i-th stream of its generator, however many there are."""
    return [list(slot) for slot in zip(*(streams([own], count) for own in rng), strict=True)]


def _together(task: Task, cond: Any, group: Group) -> Iterator[tuple[Any, list[torch.Generator], Tensor | None]]:
    """(conditioning, generators, latents) of as many slots as `task.batch` holds, samples of one slot side by side."""
    for piece in pieces_of(len(group.slots), max(1, task.batch // len(cond))):
        rows = cond[list(range(len(cond))) * len(piece)]
        generators = [one for slot in piece for one in group.slots[slot]]
        latents = None if group.latents is None else rearrange(group.latents[piece], "n p ... -> (n p) ...")
        yield rows, generators, latents


def rendered(task: Task, cond: Any, group: Group) -> Iterator[Found]:
    """The P finished and scored samples of each slot; memory holds those that are denoised at once."""
    plan = deterministic(len(cond.timesteps), group.start)
    for rows, generators, entering in _together(task, cond, group):
        found = task.score(task.rollout(rows, generators, plan, latents=entering).x0, rows)
        yield from (found[list(range(i, i + len(cond)))] for i in range(0, len(rows), len(cond)))


def judged(task: Task, cond: Any, group: Group, stop: int) -> tuple[Tensor, Tensor]:
    """What enters step `stop` (n, P, ...), and the totals (n, P) of the clean estimates of the step before it."""
    plan = deterministic(len(cond.timesteps), group.start)
    ends, totals = [], []
    for rows, generators, entering in _together(task, cond, group):
        estimate: list[Tensor] = []

        def watch(step: Step, estimate: list[Tensor] = estimate) -> Step:
            estimate[:] = [x0_from_velocity(task.policy.path, step.velocity, step.latents, step.sigma)]
            return step

        rolled = task.rollout(rows, generators, plan, steer=watch, latents=entering, stop=stop)
        total = task.score(estimate[0], rows).scores.total
        ends.append(rearrange(rolled.x0, "(n p) ... -> n p ...", p=len(cond)))
        totals.append(rearrange(total, "(n p) -> n p", p=len(cond)))
    return torch.cat(ends), torch.cat(totals)


def rows_where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """(P, ...): the rows of `one` where `chosen` (P,) says so, else those of `other`."""
    return torch.where(rearrange(chosen, "p -> p" + " 1" * (one.ndim - 1)), one, other)
