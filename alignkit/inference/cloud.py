"""One run of particles: the steering functions of `particles.FK` and `particles.DAS`, with the weights they carry."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from alignkit.flow.particles import (
    Potential,
    Resampling,
    Weights,
    after_resampling,
    ancestors_of,
    completed,
    effective_size,
    equal_weights,
    tempered,
    twist,
    uneven,
    unscored,
    weighed,
)
from alignkit.flow.path import expand_to, x0_from_velocity
from alignkit.flow.plan import Plan
from alignkit.flow.transition import Transition
from alignkit.inference.steering import Through, carried_to_latents, require_finite, reward_gradient, shortened
from alignkit.inference.task import Task, comparable
from alignkit.types import Step

Pick = Literal["best", "sample"]


@dataclass
class Cloud:
    """The particles of one run and their weights, row p * K + k for particle k of prompt p.

    Attributes:
        cond: of the P * K particles.
        rng: one generator per prompt, which draws the resampling.
        count: K.
        resampling, ess: how, and below which share of effective particles.
    """

    task: Task
    cond: Any
    rng: list[torch.Generator]
    count: int
    resampling: Resampling
    ess: float

    def start(self, potential: Potential) -> Weights:
        """Equal weights."""
        return equal_weights(potential, len(self.rng), self.count)

    def by_prompt(self, values: Tensor) -> Tensor:
        """(P * K,) on any device -> (P, K) float64 on the CPU."""
        return rearrange(values.detach().cpu().double(), "(p k) -> p k", k=self.count)

    def resampled(self, weights: Weights, reward: Tensor, step: Step) -> tuple[Weights, Tensor]:
        """The weights after resampling where they are uneven, and whose copy each row is, (P * K,); noted."""
        rows = uneven(weights.log_weights, self.ess)
        self.task.note("moment", step.index)
        self.task.note("ess", effective_size(weights.log_weights).tolist())
        self.task.note("resampled", rows.tolist())
        self.task.note("unscored", int(unscored(reward).sum()))
        own = ancestors_of(self.resampling, weights.log_weights, rows, self.rng)
        first = rearrange(torch.arange(len(self.rng)) * self.count, "p -> p 1")
        return after_resampling(weights, own, rows), rearrange(own + first, "p k -> (p k)").to(step.latents.device)


def taken(step: Step, rows: Tensor) -> Step:
    """The step of copies: row i is a copy of `rows[i]`."""
    return replace(step, latents=step.latents[rows], velocity=step.velocity[rows])


def chosen(pick: Pick, total: Tensor, log_weights: Tensor, rng: list[torch.Generator]) -> list[int]:
    """The row of each prompt's chosen particle, of rewards (P * K,) and log-weights (P, K); a particle without a reward
    is chosen only where no other has one."""
    prompts, count = log_weights.shape
    if pick == "best":
        reward = rearrange(total.cpu(), "(p k) -> p k", k=count)
        best = comparable(reward).argmax(dim=1)
    else:
        best = ancestors_of("multinomial", log_weights, torch.ones(prompts, dtype=torch.bool), rng)[:, 0]
    return [prompt * count + int(own) for prompt, own in enumerate(best)]


@dataclass
class FKRun:
    """One run of FK: a steering function with the weights of its particles."""

    cloud: Cloud
    potential: Potential
    strength: float
    moments: frozenset[int]
    weights: Weights

    def __call__(self, step: Step) -> Step:
        if step.index not in self.moments:
            return step
        cloud = self.cloud
        x0 = x0_from_velocity(cloud.task.policy.path, step.velocity, step.latents, step.sigma)
        reward = cloud.by_prompt(cloud.task.score(x0, cloud.cond).scores.total)
        weights = weighed(self.weights, self.potential, reward, self.strength)
        self.weights, rows = cloud.resampled(weights, reward, step)
        return taken(step, rows)

    def end(self, total: Tensor) -> Tensor:
        """(P, K) the last log-weights, given the rewards (P * K,) of the samples."""
        reward = self.cloud.by_prompt(total)
        return completed(self.weights, self.potential, reward, self.strength).log_weights


@dataclass(frozen=True)
class Proposal:
    """A step as it was proposed: the sampler's own Gaussian, and by how much its mean was shifted (P * K, ...)."""

    plain: Transition
    shift: Tensor

    def log_ratio(self, latents: Tensor) -> Tensor:
        """(P * K,) log density of the sampler's own step over that of the proposal."""
        return twist(latents, self.plain.mean, self.shift, self.plain.std, self.plain.mask)


@dataclass
class DASRun:
    """One run of DAS: a steering function with the weights of its particles, the last proposal, and by what it changes
    their weights, `factor` (P, K)."""

    cloud: Cloud
    plan: Plan
    strength: float
    gamma: float
    through: Through
    clip: float | None
    gradient_batch: int | None
    weights: Weights
    last: Proposal | None = None
    factor: Tensor | None = None

    def __call__(self, step: Step) -> Step:
        self.factor = None if self.last is None else self.cloud.by_prompt(self.last.log_ratio(step.latents))
        level = tempered(step.index, self.gamma)
        if level == 0 or not step.stochastic:  # the step without noise ends at its clean estimate: scored at the end
            return step
        reward, gradient = self.seen(step)
        own = self.cloud.by_prompt(reward)
        weights = weighed(self.weights, "diff", level * own, self.strength, self.factor)
        self.weights, rows = self.cloud.resampled(weights, own, step)
        return self.shifted(taken(step, rows), level * self.strength * gradient[rows])

    def seen(self, step: Step) -> tuple[Tensor, Tensor]:
        """Rewards (P * K,) of the clean estimates, and their gradients with respect to the latents (P * K, ...)."""
        task, cond, batch = self.cloud.task, self.cloud.cond, self.gradient_batch
        x0 = x0_from_velocity(task.policy.path, step.velocity, step.latents, step.sigma)
        reward, gradient = reward_gradient(task.reward_of_clean, x0, cond, batch)
        return reward, carried_to_latents(task, step, cond, gradient, self.through, batch)

    def shifted(self, step: Step, gradient: Tensor) -> Step:
        """The step with its mean moved by std^2 `gradient` (P * K, ...), as a change of its velocity; remembered."""
        require_finite(gradient, self.cloud.cond, step)
        sigmas = self.cloud.cond.sigmas
        levels = step.sigma, step.sigma_next, float(sigmas[1])
        rate = self.plan.noise_at(step.index).coefficients(self.cloud.task.policy.path, *levels)
        plain = step.transition(step.latents, step.velocity)
        shift = shortened(expand_to(rate.std, gradient) * gradient, self.clip)
        if plain.mask is not None:
            shift = shift * plain.mask.to(shift)
        velocity = step.velocity + expand_to(rate.std / rate.velocity, shift) * shift
        made = step.transition(step.latents, velocity).mean - plain.mean
        self.last = Proposal(plain, made)
        return replace(step, velocity=velocity)

    def end(self, total: Tensor) -> Tensor:
        """(P, K) the last log-weights, given the rewards (P * K,) of the samples."""
        return completed(self.weights, "diff", self.cloud.by_prompt(total), self.strength, self.factor).log_weights


Run = FKRun | DASRun
