"""Tasks on points of the analytic mixture, and rewards of points that remember how they were asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.inference.judges import Judges
from alignkit.inference.task import Task
from recipes.mixture.policy import MixturePolicy
from recipes.mixture.world import FOUR, Mixture, bimodal

STEPS = 8


class Asked:
    """A reward of points.

    Attributes:
        batches: how many points each call had.
    """

    kind = "latent"

    def __init__(
        self, function: Callable[[Tensor], Tensor] = bimodal, name: str = "asked", differentiable: bool = True
    ) -> None:
        self.function, self.name, self.differentiable = function, name, differentiable
        self.batches: list[int] = []

    def __call__(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        self.batches.append(len(media))
        return self.function(media)


def exact_policy(mixture: Mixture = FOUR) -> MixturePolicy:
    policy = MixturePolicy(mixture)
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    return policy


def task_of(reward: Any, budget: float = 4.0, batch: int = 16, num_steps: int = STEPS) -> Task:
    return Task(exact_policy(), Judges(reward), num_steps, budget, batch)


def points(task: Task, count: int) -> Any:
    """Conditioning of `count` prompts."""
    return task.policy.condition([f"p{i}" for i in range(count)], num_steps=task.num_steps)


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def recorded_batches(task: Task) -> list[int]:
    """How many points each call of the task's denoiser has, from now on."""
    batches: list[int] = []
    velocity = task.policy.velocity

    def record(x: Tensor, *rest: Any) -> Tensor:
        batches.append(len(x))
        return velocity(x, *rest)

    task.policy.velocity = record
    return batches


def decoded(pipe: Any, draw: Callable[[], Any]) -> tuple[Any, int]:
    """What `draw` returns, and how often the last block of the pipeline's decoder ran meanwhile."""
    ran: list[int] = []
    hook = pipe.vae.decoder.up_blocks[-1].register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        return draw(), len(ran)
    finally:
        hook.remove()
