"""The data that moves between the rooms: frozen, almost without behaviour."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch


class Prompt(str):
    """A prompt is text that also knows which row of its file it came from.

    Attributes:
        id: integer identity; two prompts with the same text and different ids are different groups.
        columns: read-only extra columns of the row (`negative_prompt`, `image`, `target`, `reference`, ...).
    """

    id: int
    columns: Mapping[str, Any]

    def __new__(cls, text: str, id: int = 0, columns: Mapping[str, Any] | None = None) -> Prompt:
        prompt = super().__new__(cls, text)
        prompt.id = int(id)
        prompt.columns = MappingProxyType(dict(columns or {}))
        return prompt

    def __reduce__(self):
        return (Prompt, (str(self), self.id, dict(self.columns)))


@dataclass(frozen=True)
class Scores:
    """Rewards of one batch of media.

    Attributes:
        total: (B,) weighted sum; NaN where a part could not be computed and the policy was `mask`.
        parts: raw, unweighted scores by reward name, each (B,).
        failed: how many samples each reward could not score.
    """

    total: torch.Tensor
    parts: Mapping[str, torch.Tensor]
    failed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepRecord:
    """One recorded step of a rollout: everything training needs to score it again.

    Attributes:
        index: position in the sampling grid.
        timestep: what the pipeline's loop variable was.
        sigma, sigma_next: noise levels before and after the step, 1 = noise, 0 = data.
        latents: (B, ...) float32, what entered the step.
        next_latents: (B, ...) float32, what the step returned.
        mean: (B, ...) float32, the transition's mean under the policy that sampled it.
        log_prob: (B,) of `next_latents` under that policy.
        mask: (B, ...) bool, False where the pipeline overwrites the latents after the step; None: nowhere.
        shift: (B, ...) float32, what a steering function added to the velocity; None: nothing, or it exchanged rows.
    """

    index: int
    timestep: float
    sigma: float
    sigma_next: float
    latents: torch.Tensor
    next_latents: torch.Tensor
    mean: torch.Tensor
    log_prob: torch.Tensor
    mask: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    def __getitem__(self, rows: torch.Tensor | list[int] | slice) -> StepRecord:
        """The same step of some of the samples."""
        tensors = {n: getattr(self, n)[rows] for n in ("latents", "next_latents", "mean", "log_prob")}
        present = {n: getattr(self, n) for n in ("mask", "shift")}
        return replace(self, **tensors, **{n: None if v is None else v[rows] for n, v in present.items()})


@dataclass(frozen=True)
class Step:
    """One step of a run before it is taken, as a steering function sees it.

    A steering function returns the step with another `velocity` (guidance) or with rows of `latents` and `velocity`
    exchanged (resampling among samples of one conditioning); the run goes on from what it returns.

    Attributes:
        index: position in the sampling grid.
        timestep: what the pipeline's loop variable is.
        sigma, sigma_next: noise levels before and after the step, 1 = noise, 0 = data.
        latents: (B, ...) float32, what enters the step.
        velocity: (B, ...) float32 dx/dsigma there, after the pipeline's own guidance.
        stochastic: whether the step adds noise.
        transition: the `flow.transition.Transition` of this step from given latents and velocity, both (B, ...).
    """

    index: int
    timestep: float
    sigma: float
    sigma_next: float
    latents: torch.Tensor
    velocity: torch.Tensor
    stochastic: bool
    transition: Callable[[torch.Tensor, torch.Tensor], Any]


Steer = Callable[[Step], Step]
"""Changes a step before it is taken; called without gradients, under the policy's lock, once per step of a run."""


@dataclass(frozen=True)
class Noised:
    """Clean latents taken to a noise level, `latents = alpha(sigma) x0 + sigma eps`; one noise level per sample.

    Attributes:
        x0, eps, latents: (B, ...) float32.
        sigma: (B,) noise levels, 1 = noise, 0 = data.
        timestep: (B,) what the network is told.
        dropped: (B,) bool, True where the caption is left out; None: nowhere.
    """

    x0: torch.Tensor
    eps: torch.Tensor
    latents: torch.Tensor
    sigma: torch.Tensor
    timestep: torch.Tensor
    dropped: torch.Tensor | None = None

    def __getitem__(self, rows: torch.Tensor | list[int] | slice) -> Noised:
        """The same of some of the samples."""
        tensors = {n: getattr(self, n)[rows] for n in ("x0", "eps", "latents", "sigma", "timestep")}
        return Noised(**tensors, dropped=None if self.dropped is None else self.dropped[rows])


@dataclass(frozen=True)
class NoisedPair:
    """Both sides of B pairs of one prompt each, with the same noise at the same level.

    Attributes:
        winner, loser: B samples; `sigma`, `eps` and `dropped` are equal.
    """

    winner: Noised
    loser: Noised

    @property
    def dropped(self) -> torch.Tensor | None:
        """(B,) bool, True where the caption is left out; None: nowhere."""
        return self.winner.dropped

    def __getitem__(self, rows: torch.Tensor | list[int] | slice) -> NoisedPair:
        """The same of some of the pairs."""
        return NoisedPair(self.winner[rows], self.loser[rows])


View = StepRecord | Noised | NoisedPair
"""What one backward of a sample goes through: a recorded step, or a noise level."""


@dataclass(frozen=True)
class Rollouts:
    """What `Policy.rollout` returns.

    Attributes:
        x0: (B, ...) float32 final latents, as `scheduler.step` last returned them.
        steps: the recorded stochastic steps, in sampling order; empty for a deterministic plan.
        sigmas: (num_steps + 1,) the grid that was used, descending to 0.
    """

    x0: torch.Tensor
    steps: tuple[StepRecord, ...]
    sigmas: torch.Tensor


@dataclass(frozen=True)
class Pairs:
    """Preferred and rejected clean latents of the same prompts, both (B, ...)."""

    winners: torch.Tensor
    losers: torch.Tensor
    prompts: tuple[Prompt, ...]
