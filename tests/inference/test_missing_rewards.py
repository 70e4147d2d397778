"""Guidance by gradients where a reward does not apply to every sample."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from alignkit.inference.gradients import DPS
from alignkit.inference.guide import run
from alignkit.inference.steering import noted, reward_gradient, smoothed_gradient
from alignkit.types import Step
from tests.inference.point_tasks import Asked, generators, points, task_of


def swirl(x: Tensor) -> Tensor:
    """(B, 2) -> (B,), with a gradient that depends on everything."""
    return (x[:, 0] * x[:, 1] + x[:, 0].sin()) + x[:, 1] ** 3 / 10


def only_right(x: Tensor) -> Any:
    """The same, and None for points on the left."""
    return [swirl(own[None])[0] if float(own[0].detach()) > 0 else None for own in x]


def step_from(x: Tensor, velocity: Tensor) -> Step:
    """A step at noise level 0.6 that nobody takes."""

    def untaken(latents: Tensor, velocity: Tensor) -> Any:
        raise AssertionError("this step is not taken")

    return Step(3, 0.6, 0.6, 0.5, x, velocity, False, untaken)


@pytest.mark.parametrize("method", [DPS(), DPS(averages=3), DPS(through="denoiser"), DPS(backward_steps=1)], ids=str)
def test_samples_without_a_reward_at_a_step_are_unguided_there_and_the_others_guided(method: DPS) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.tensor([[9.0, 1.0], [-9.0, 1.0], [8.0, -1.0]])
    step = step_from(x, torch.randn(3, 2, generator=rng))
    guided, wanted = (
        method.steered(task, points(task, 3), step, 1.0).velocity
        for task in (task_of(Asked(only_right)), task_of(Asked(swirl)))
    )
    assert torch.equal(guided[1], step.velocity[1]) and not torch.equal(wanted[1], step.velocity[1])
    assert_close(guided[[0, 2]], wanted[[0, 2]])


def test_a_run_goes_on_where_some_samples_have_no_reward() -> None:
    task = task_of(Asked(only_right), budget=2.0)
    assert bool(run(DPS(weight=0.1), task, points(task, 6), generators(6)).latents.isfinite().all())
    assert all(note["reward"] is not None for note in task.trace["guidance"])


def test_a_sample_without_a_reward_has_no_gradient_even_alone() -> None:
    def right(x: Tensor, cond: Any) -> Tensor:
        answers = only_right(x)
        return torch.stack([torch.tensor(math.nan) if own is None else own for own in answers])

    x, two = torch.tensor([[1.0, 2.0], [-1.0, 2.0]]), points(task_of(Asked()), 2)
    _, alone = reward_gradient(lambda x, cond: swirl(x), x[:1], two[[0]])
    for batch in (1, None):
        values, gradient = reward_gradient(right, x, two, batch)
        assert_close(values, torch.tensor([float(swirl(x[:1])), math.nan]), equal_nan=True)
        assert_close(gradient, torch.cat([alone, torch.zeros(1, 2)]))


def test_the_trace_has_the_mean_of_the_rewards_there_are() -> None:
    notes: list[float | None] = []
    step = step_from(torch.zeros(3, 2), torch.ones(3, 2))
    for values in ([1.0, math.nan, 3.0], [math.nan] * 3):
        noted(step, step.velocity, torch.tensor(values), lambda name, value: notes.append(value["reward"]))
    assert notes == [2.0, None]


def test_an_average_leaves_out_draws_without_a_reward() -> None:
    x0, offsets = torch.tensor([[1.0, 2.0], [-3.0, 1.0]]).double(), [torch.zeros(1, 2), torch.full((1, 2), -2.0)]
    two = points(task_of(Asked()), 2)

    def right(x: Tensor, cond: Any) -> Tensor:
        return torch.where(x[:, 0] > 0, swirl(x), math.nan)

    values, gradient = smoothed_gradient(right, x0, two, [one.double() for one in offsets], 2.5)
    _, alone = reward_gradient(lambda x, cond: swirl(x), x0[:1], two[[0]])
    assert_close(values, torch.tensor([float(swirl(x0[:1])), math.nan]).double(), equal_nan=True)
    assert_close(gradient, torch.cat([alone, torch.zeros(1, 2).double()]))
