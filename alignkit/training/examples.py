"""What a reward model learns from: batches of pairs, of several pictures per prompt, of labels, of views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor, nn

from alignkit.errors import DataError
from alignkit.flow.path import Path, RectifiedFlow, expand_to
from alignkit.objectives.preference import FIRST, INVALID, SECOND, TIE
from alignkit.types import Prompt

RECTIFIED = RectifiedFlow()


@runtime_checkable
class Movable(Protocol):
    """A batch with tensors that belong on the run's device."""

    def to(self, device: torch.device) -> Any: ...


@runtime_checkable
class Noisable(Protocol):
    """A batch that can be taken to a noise level; the scorer is then handed `sigma`."""

    def noised(self, low: float, high: float, rng: torch.Generator) -> Any: ...


@dataclass(frozen=True)
class PairBatch:
    """Two pictures (or latents) for each prompt, one preferred.

    Attributes:
        winners, losers: (B, ...).
        prompts: B prompts.
        ties: (B,) bool, True where neither is preferred, or (B, D) for each dimension; None: no ties.
        sigma: (B,) noise level of both sides; None: clean.
        preferred: (B, D) for each of D dimensions 1 where the winner is the better, -1 where the loser is, 0 where
            the two tie or the pair says nothing of it; None: there is one dimension, and winners win.
        path: how latents are noised; pictures and rectified flow have the default.
    """

    winners: Tensor
    losers: Tensor
    prompts: Sequence[Prompt]
    ties: Tensor | None = None
    sigma: Tensor | None = None
    preferred: Tensor | None = None
    path: Path = RECTIFIED

    @classmethod
    def of_labels(cls, first: Tensor, second: Tensor, prompts: Sequence[Prompt], labels: Tensor) -> PairBatch:
        """Of labels (B, D) as people give them: 1 first is better, -1 second, 0 tie, 22 no valid answer.

        Raises:
            DataError: labels of another shape, or other labels.
        """
        strange = sorted(set(labels.unique().tolist()) - {FIRST, SECOND, TIE, INVALID})
        if labels.ndim != 2 or len(labels) != len(prompts) or strange:
            raise DataError(
                f"labels of shape {tuple(labels.shape)}{f' holding {strange}' if strange else ''}; expected "
                f"({len(prompts)}, dimensions) of 1, -1, 0 (tie) and 22 (none)"
            )
        return cls(first, second, prompts, ties=labels == TIE, preferred=labels.masked_fill(labels == INVALID, 0))

    @property
    def labels(self) -> Tensor:
        """(B, D) labels of the winners against the losers, `of_labels` undone; D is 1 without `preferred`."""
        preferred = torch.ones(len(self.winners), 1, dtype=torch.long, device=self.winners.device)
        if self.preferred is not None:
            preferred = self.preferred
        ties = torch.zeros_like(preferred, dtype=torch.bool) if self.ties is None else self.ties
        ties = rearrange(ties, "b -> b 1") if ties.ndim == 1 else ties
        return torch.where(preferred == 0, INVALID, preferred).masked_fill(ties, TIE)

    def to(self, device: torch.device) -> PairBatch:
        held = {name: getattr(self, name) for name in ("winners", "losers", "ties", "sigma", "preferred")}
        return replace(self, **{name: value.to(device) for name, value in held.items() if value is not None})

    def noised(self, low: float, high: float, rng: torch.Generator) -> PairBatch:
        """Both sides of a pair get the same noise and the same level, so that only the pictures differ."""
        sigma = levels(len(self.winners), low, high, rng)
        eps = torch.randn(self.winners.shape, generator=rng)
        winners, losers = (at_level(x, eps, sigma, self.path) for x in (self.winners, self.losers))
        return replace(self, winners=winners, losers=losers, sigma=sigma.to(winners.device))


@dataclass(frozen=True)
class ChoiceBatch:
    """G pictures for each prompt with the probability that each is the preferred one.

    Attributes:
        media: (B, G, ...).
        prompts: B prompts.
        targets: (B, G), rows sum to 1; a tie of two is (0.5, 0.5).
        sigma: (B,) noise level of all G; None: clean.
    """

    media: Tensor
    prompts: Sequence[Prompt]
    targets: Tensor
    sigma: Tensor | None = None

    def to(self, device: torch.device) -> ChoiceBatch:
        return replace(self, media=self.media.to(device), targets=self.targets.to(device))

    def noised(self, low: float, high: float, rng: torch.Generator) -> ChoiceBatch:
        """All pictures of a prompt get the same noise and the same level."""
        sigma = levels(len(self.media), low, high, rng)
        eps = torch.randn(self.media[:, :1].shape, generator=rng)
        return replace(self, media=at_level(self.media, eps, sigma), sigma=sigma.to(self.media.device))


@dataclass(frozen=True)
class LabelBatch:
    """Pictures with labels.

    Attributes:
        media: (B, ...).
        prompts: B prompts.
        labels: (B,) or (B, D), in [0, 1] for yes-no questions.
        sigma: (B,) noise level; None: clean.
    """

    media: Tensor
    prompts: Sequence[Prompt]
    labels: Tensor
    sigma: Tensor | None = None

    def to(self, device: torch.device) -> LabelBatch:
        return replace(self, media=self.media.to(device), labels=self.labels.to(device))

    def noised(self, low: float, high: float, rng: torch.Generator) -> LabelBatch:
        """Each picture at its own level."""
        sigma = levels(len(self.media), low, high, rng)
        eps = torch.randn(self.media.shape, generator=rng)
        return replace(self, media=at_level(self.media, eps, sigma), sigma=sigma.to(self.media.device))


@dataclass(frozen=True)
class ViewBatch:
    """Several augmented views of each picture, without labels.

    Attributes:
        views: each (B, 3, h, w); sizes may differ between views.
        teacher_views: how many of the first views the teacher sees too (DINO: the large crops).
    """

    views: tuple[Tensor, ...]
    teacher_views: int = 2

    def to(self, device: torch.device) -> ViewBatch:
        return replace(self, views=tuple(view.to(device) for view in self.views))


def levels(count: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    """(count,) noise levels, uniform in [low, high)."""
    return low + (high - low) * torch.rand(count, generator=rng)


def at_level(x0: Tensor, eps: Tensor, sigma: Tensor, path: Path = RECTIFIED) -> Tensor:
    """`alpha(sigma) x0 + sigma eps`, on x0's device; sigma (B,), eps broadcasts to x0 (B, ...)."""
    return expand_to(path.alpha(sigma), x0) * x0 + expand_to(sigma, x0) * eps.to(x0.device)


def score(model: nn.Module, media: Tensor, prompts: Sequence[Prompt], sigma: Tensor | None) -> Tensor:
    """(B,) or (B, D) scores; a scorer of noisy examples takes their level as a third argument."""
    return model(media, prompts) if sigma is None else model(media, prompts, sigma)
