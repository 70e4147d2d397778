"""Rewards of noised points with closed forms: what the right guidance is, and what is taken for it.

Guiding by `r(x, sigma) = log E[exp(lambda r(x0)) | x_sigma = x]` samples the tilt `p exp(lambda r)` (VideoAlign
2501.13918 needs exactly this of a noise-aware reward). Its look-alikes do not: the mean `lambda E[r(x0) | x_sigma]`
that regression learns, and the clean reward asked about noised points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from recipes.mixture.world import Mixture

Noised = Callable[[Tensor, Tensor, Any], Tensor]
"""(points (B, D), sigma (B,), conditioning) -> (B,)"""


@dataclass(frozen=True)
class Posterior:
    """x0 given x_sigma: a mixture of round Gaussians.

    Attributes:
        log_shares: (B, K).
        means: (B, K, D).
        variance: (B, 1), of every mode.
    """

    log_shares: Tensor
    means: Tensor
    variance: Tensor


def posterior(mixture: Mixture, x: Tensor, sigma: Tensor) -> Posterior:
    """Of points (B, D) at noise levels (B,)."""
    keep, level = rearrange(1.0 - sigma, "b -> b 1"), rearrange(sigma, "b -> b 1")
    total = keep**2 * mixture.std**2 + level**2
    centres = mixture.centres(x)
    offset = rearrange(x, "b d -> b 1 d") - rearrange(keep, "b 1 -> b 1 1") * centres
    log_shares = (mixture.log_shares(x) - offset.square().sum(-1) / (2.0 * total)).log_softmax(-1)
    means = centres + rearrange(keep * mixture.std**2 / total, "b 1 -> b 1 1") * offset
    return Posterior(log_shares, means, mixture.std**2 * level**2 / total)


class Shape(Protocol):
    """A reward of points whose expectations under a Gaussian have closed forms."""

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) -> (...)."""
        ...

    def mean(self, centre: Tensor, variance: Tensor) -> Tensor:
        """E[r] under N(centre, variance), (..., D) and (...) -> (...)."""
        ...

    def log_mean_exp(self, centre: Tensor, variance: Tensor, strength: float) -> Tensor:
        """log E[exp(strength r)]."""
        ...


@dataclass(frozen=True)
class Linear:
    """direction . x"""

    direction: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return (x * x.new_tensor(self.direction)).sum(-1)

    def mean(self, centre: Tensor, variance: Tensor) -> Tensor:
        return self(centre)

    def log_mean_exp(self, centre: Tensor, variance: Tensor, strength: float) -> Tensor:
        square = sum(a**2 for a in self.direction)
        return strength * self(centre) + strength**2 * square * variance / 2.0


@dataclass(frozen=True)
class Quadratic:
    """-scale |x - point|^2"""

    point: tuple[float, ...]
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        return -self.scale * (x - x.new_tensor(self.point)).square().sum(-1)

    def mean(self, centre: Tensor, variance: Tensor) -> Tensor:
        return self(centre) - self.scale * len(self.point) * variance

    def log_mean_exp(self, centre: Tensor, variance: Tensor, strength: float) -> Tensor:
        widened = 1.0 + 2.0 * strength * self.scale * variance
        return strength * self(centre) / widened - len(self.point) / 2.0 * widened.log()


def exact(mixture: Mixture, reward: Shape, strength: float = 1.0) -> Noised:
    """log E[exp(strength r(x0)) | x_sigma]."""

    def noised(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        given = posterior(mixture, x, sigma)
        own = reward.log_mean_exp(given.means, given.variance, strength)
        return (given.log_shares + own).logsumexp(-1)

    return noised


def expected(mixture: Mixture, reward: Shape, strength: float = 1.0) -> Noised:
    """strength E[r(x0) | x_sigma]: what regression of the reward on noised points finds."""

    def noised(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        given = posterior(mixture, x, sigma)
        return strength * (given.log_shares.exp() * reward.mean(given.means, given.variance)).sum(-1)

    return noised


def clean(reward: Callable[[Tensor], Tensor], strength: float = 1.0) -> Noised:
    """strength r(x_sigma): a reward that takes noised points for clean ones."""

    def noised(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return strength * reward(x)

    return noised


@dataclass(frozen=True, eq=False)
class NoisedReward:
    """A noised reward with the surface of a noise-aware reward of the package."""

    function: Noised
    name: str = "noised"
    kind: str = "latent"
    differentiable: bool = True
    noise_aware: bool = True

    def __call__(self, latents: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """(B,) of points (B, D) at noise levels (B,)."""
        return self.function(latents, sigma, cond)


def tilted_moments(
    mixture: Mixture, reward: Shape, strength: float, right_of: float = 0.0
) -> tuple[float, float, float]:
    """(E[r], share with a first coordinate above `right_of`, mean of the first coordinate there) of the tilt.

    The mixture is one-dimensional; summed over a grid from -6 to 6.
    """
    x = torch.linspace(-6.0, 6.0, 24001, dtype=torch.float64)[:, None]
    values = reward(x)
    chance = (mixture.log_prob(x) + strength * values).softmax(0)
    right = chance * (x[:, 0] > 0)
    return float((chance * values).sum()), float(right.sum()), float((right * x[:, 0]).sum() / right.sum())
