"""What a method of guidance works with: a policy, rewards, a budget, and a count of what was spent."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from alignkit.flow.plan import Plan, deterministic
from alignkit.flow.transition import per_sample_generators
from alignkit.inference.judges import Judges
from alignkit.types import Rollouts, Scores, Steer


@dataclass(frozen=True)
class Found:
    """P samples with their rewards.

    Attributes:
        x0: (P, ...) clean latents.
        media: (P, 3, H, W) or (P, T, 3, H, W) in [0, 1].
        scores: of the P samples; how many a reward could not score is not kept.
    """

    x0: torch.Tensor
    media: torch.Tensor
    scores: Scores

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, rows: torch.Tensor | list[int] | slice) -> Found:
        """Some of the samples."""
        parts = {name: value[rows] for name, value in self.scores.parts.items()}
        return Found(self.x0[rows], self.media[rows], Scores(self.scores.total[rows], parts))

    def to(self, device: torch.device | str) -> Found:
        """The same on another device."""
        parts = {name: value.to(device) for name, value in self.scores.parts.items()}
        scores = replace(self.scores, total=self.scores.total.to(device), parts=parts)
        return Found(self.x0.to(device), self.media.to(device), scores)

    @classmethod
    def joined(cls, pieces: Sequence[Found]) -> Found:
        """The samples of all pieces, in order."""
        names = pieces[0].scores.parts
        parts = {name: torch.cat([one.scores.parts[name] for one in pieces]) for name in names}
        total = torch.cat([one.scores.total for one in pieces])
        x0, media = (torch.cat([getattr(one, name) for one in pieces]) for name in ("x0", "media"))
        return cls(x0, media, Scores(total, parts))

    def better(self, other: Found) -> Found:
        """Of each row the one with the larger total; a row without a total (NaN) never wins against one with."""
        mine, theirs = (comparable(one.scores.total) for one in (self, other))
        count = len(self)
        rows = torch.arange(count, device=mine.device)
        return Found.joined([self, other])[torch.where(theirs > mine, rows + count, rows)]


def comparable(total: torch.Tensor) -> torch.Tensor:
    """Totals in which a missing one (NaN) loses against all others, same shape."""
    return torch.where(total.isnan(), -math.inf, total)


def best(candidates: Sequence[Found]) -> Found:
    """Of each row the candidate with the largest total; the earlier one where they are equal."""
    found = candidates[0]
    for other in candidates[1:]:
        found = found.better(other)
    return found


@dataclass
class Calls:
    """What is computed, in samples: what one prompt will cost, or what was spent so far.

    Attributes:
        denoiser: steps of samples through the pipeline's denoiser, its guidance included.
        denoiser_gradients: those of them that were differentiated.
        head: noise-aware rewards, each sample and noise level; `head_gradients`: those that were differentiated.
        decodes, decode_gradients: decoded samples.
        rewards: scored samples.
    """

    denoiser: int = 0
    denoiser_gradients: int = 0
    head: int = 0
    head_gradients: int = 0
    decodes: int = 0
    decode_gradients: int = 0
    rewards: int = 0

    def __mul__(self, count: int) -> Calls:
        return Calls(**{name: value * count for name, value in asdict(self).items()})


@dataclass
class Task:
    """One call of `guide`, as a method sees it.

    Attributes:
        policy: an `alignkit.Policy`, or what has its surface.
        num_steps: steps of a plain sample.
        budget: denoiser calls over those of one plain sample per prompt.
        batch: samples that are denoised, decoded and scored at once.
        sigmas: (num_steps + 1,) noise levels of the sampler; None: evenly from 1 to 0.
        on_step: called before every step of the sampler; may raise to stop.
        trace: what methods noted on the way, by name.
    """

    policy: Any
    judges: Judges
    num_steps: int
    budget: float = 1.0
    batch: int = 16
    sigmas: torch.Tensor | None = None
    on_step: Callable[[], None] | None = None
    spent: Calls = field(default_factory=Calls)
    trace: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))

    def note(self, name: str, value: Any) -> None:
        """Append to the trace."""
        self.trace[name].append(value)

    def poll(self) -> None:
        """Ask whether to go on."""
        if self.on_step is not None:
            self.on_step()

    # what costs

    def rollout(
        self,
        cond: Any,
        rng: list[torch.Generator],
        plan: Plan | None = None,
        *,
        steer: Steer | None = None,
        repeats: Mapping[int, int] | None = None,
        latents: torch.Tensor | None = None,
        stop: int | None = None,
    ) -> Rollouts:
        """`Policy.rollout`; without a plan the deterministic sampler."""
        plan = deterministic(len(cond.timesteps)) if plan is None else plan
        steps = range(plan.start, plan.num_steps if stop is None else stop)
        self.spent.denoiser += len(cond) * sum((repeats or {}).get(k, 1) for k in steps)
        options: dict[str, Any] = {"latents": latents, "stop": stop, "steer": steer, "repeats": repeats}
        return self.policy.rollout(cond, plan, rng, poll=self.poll, record=False, **options)

    def velocity(self, x: torch.Tensor, t: torch.Tensor | float, cond: Any) -> torch.Tensor:
        """`Policy.velocity`; gradients flow."""
        self.spent.denoiser += len(cond)
        if torch.is_grad_enabled() and x.requires_grad:
            self.spent.denoiser_gradients += len(cond)
        return self.policy.velocity(x, t, cond)

    @torch.no_grad()
    def score(self, x0: torch.Tensor, cond: Any) -> Found:
        """Decode clean latents x0 (B, ...) and ask what steers about them, at most `batch` at once."""
        pieces = []
        for rows in pieces_of(len(x0), self.batch):
            latents, own = x0[rows], cond[rows]
            media = self.policy.decode(latents, own)
            self.spent.decodes += len(latents)
            self.spent.rewards += len(latents)
            pieces.append(Found(latents, media, self.judges.scores(media, latents, own)))
        return Found.joined(pieces)

    @torch.no_grad()
    def judged(self, found: Found, cond: Any) -> Found:
        """Chosen samples, also with the scores of rewards that are only reported."""
        pieces = []
        for rows in pieces_of(len(found), self.batch):
            one = found[rows]
            scores = self.judges.with_reported(one.scores, one.media, one.x0, cond[rows])
            pieces.append(replace(one, scores=scores))
        return Found.joined(pieces)

    def reward_of_clean(self, x0: torch.Tensor, cond: Any) -> torch.Tensor:
        """(B,) total reward of clean latents x0 (B, ...), decoded; gradients flow to x0."""
        grad = torch.is_grad_enabled() and x0.requires_grad
        self.spent.decodes += len(x0)
        self.spent.decode_gradients += len(x0) if grad else 0
        self.spent.rewards += len(x0)
        return self.judges.scores(self.policy.decode(x0, cond), x0, cond).total

    def reward_at(self, x: torch.Tensor, sigma: torch.Tensor | float, cond: Any) -> torch.Tensor:
        """(B,) weighted sum of the noise-aware rewards of latents x (B, ...) at noise level `sigma`, a number or (B,);
        gradients flow to x."""
        self.spent.head += len(x)
        self.spent.head_gradients += len(x) if torch.is_grad_enabled() and x.requires_grad else 0
        return self.judges.at_level(x, sigma, cond)


def pieces_of(count: int, size: int) -> list[list[int]]:
    """Row numbers 0..count-1 in pieces of at most `size`."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def streams(rng: Sequence[torch.Generator], count: int) -> list[torch.Generator]:
    """`count` generators for each of P, side by side as `cond.repeat(count)` has the copies; for each of P, the first
    n do not depend on `count`."""
    return [one for own in rng for one in per_sample_generators(own, count)]
