"""Weights and resampling of particles: K samples of each of P prompts, steered by a reward that is seen on the way.

A particle's path is weighted by potentials, one at every moment when its clean estimate is scored, and one at the end
with the reward of what it became. Their product is exp(strength * reward of x0), so weighted particles are samples of
`p(x0) exp(strength r(x0))` whatever the moments were (Feynman-Kac steering, 2501.06848). Resampling replaces weights
by copies and never changes an expectation. All of it is in log space, float64; (P, K) throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from einops import rearrange, repeat
from torch import Tensor

from alignkit.errors import RecipeError
from alignkit.flow.transition import reduce_positions

Potential = Literal["diff", "max", "add", "rt", "is", "bon"]
Resampling = Literal["systematic", "multinomial", "ssp"]
POTENTIALS: tuple[str, ...] = get_args(Potential)

NOT_ABOVE = 1.0 - 2.0**-53
"""The largest float64 below 1: where a uniform number may lie at most."""


@dataclass(frozen=True)
class Weights:
    """What the weights of particles need to know of their past.

    Attributes:
        log_weights: (P, K) float64; what no resampling has used up yet. Only differences within a row matter for
            choosing; the mean of the weights estimates E[exp(strength r)] at the end.
        spent: (P, K) sum of the log-potentials along each particle's own path.
        memory: (P, K) the last reward (`diff`), the highest (`max`) or their sum (`add`).
    """

    log_weights: Tensor
    spent: Tensor
    memory: Tensor


def equal_weights(potential: Potential, prompts: int, count: int) -> Weights:
    """The weights of particles that nothing is known of: `prompts` rows of `count`.

    `max` has no floor here; the published code starts it at 0.
    """
    zero = torch.zeros(prompts, count, dtype=torch.float64)
    return Weights(zero, zero, torch.full_like(zero, -math.inf) if potential == "max" else zero)


def log_potential(potential: Potential, memory: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
    """(log-potential at strength 1, new memory), both (P, K), of rewards (P, K) of clean estimates.

    diff: r - r_last. max: the highest so far. add: the sum so far. rt: r. is, bon: nothing before the end.
    """
    if potential == "diff":
        return reward - memory, reward
    if potential == "max":
        highest = torch.maximum(memory, reward)
        return highest, highest
    if potential == "add":
        return memory + reward, memory + reward
    if potential == "rt":
        return reward, reward
    if potential in ("is", "bon"):
        return torch.zeros_like(reward), memory
    raise RecipeError(f"potential={potential!r} is not known; expected one of {', '.join(POTENTIALS)}")


def weighed(
    weights: Weights, potential: Potential, reward: Tensor, strength: float, factor: Tensor | None = None
) -> Weights:
    """The weights after clean estimates were scored.

    A particle without a finite reward gets weight 0. Where that would leave a prompt no particle, none of its
    particles is weighed.

    Args:
        reward: (P, K).
        factor: (P, K) log of what else multiplies the weights and is not a potential, such as the density of the step
            over that of a proposal; it counts for every particle.
    """
    reward = reward.to(weights.memory)
    value, memory = log_potential(potential, weights.memory, reward)
    kept = _proposed(weights, factor)
    return _weighed(kept, strength * value, memory, ~reward.isfinite())


def completed(
    weights: Weights, potential: Potential, reward: Tensor, strength: float, factor: Tensor | None = None
) -> Weights:
    """The weights after the samples themselves were scored: the last potential is exp(strength r) over the product of
    those before, so that the whole is exp(strength r). `bon` leaves weight to the best particle only.

    Args:
        reward: (P, K) of x0; not finite as in `weighed`.
        factor: as in `weighed`.
    """
    reward = reward.to(weights.memory)
    kept = _proposed(weights, factor)
    missing = ~reward.isfinite()
    done = _weighed(kept, strength * reward - kept.spent, reward, missing)
    if potential != "bon":
        return done
    best = reward.masked_fill(missing, -math.inf).argmax(dim=1, keepdim=True)
    only = torch.full_like(reward, -math.inf).scatter(1, best, done.log_weights.gather(1, best))
    return replace(done, log_weights=only)


def unscored(reward: Tensor) -> Tensor:
    """(P,) bool: prompts none of whose particles has a finite reward (P, K)."""
    return ~reward.isfinite().any(dim=1)


def _proposed(weights: Weights, factor: Tensor | None) -> Weights:
    if factor is None:
        return weights
    return replace(weights, log_weights=weights.log_weights + factor.to(weights.log_weights))


def _weighed(weights: Weights, increment: Tensor, memory: Tensor, missing: Tensor) -> Weights:
    log_weights = (weights.log_weights + increment).masked_fill(missing, -math.inf)
    alive = log_weights.isfinite().any(dim=1, keepdim=True)
    return Weights(
        torch.where(alive, log_weights, weights.log_weights),
        torch.where(alive & ~missing, weights.spent + increment, weights.spent),
        torch.where(alive & ~missing, memory, weights.memory),
    )


def effective_size(log_weights: Tensor) -> Tensor:
    """(P,) 1 / sum of squared normalised weights: K for equal weights, 1 when one particle has everything."""
    return 1.0 / log_weights.softmax(dim=1).square().sum(dim=1)


def uneven(log_weights: Tensor, share: float) -> Tensor:
    """(P,) bool: whose effective size is below `share` of K. Equal weights never are, not even with a share of 1."""
    count = log_weights.shape[1]
    return effective_size(log_weights) < share * count * (1.0 - 1e-9)


def after_resampling(weights: Weights, ancestors: Tensor, rows: Tensor) -> Weights:
    """The weights of the copies: where a prompt was resampled, `rows` (P,) bool, each has the mean of the old weights.

    Args:
        ancestors: (P, K) int64, whose copy each particle is.
    """
    count = weights.log_weights.shape[1]
    mean = weights.log_weights.logsumexp(dim=1, keepdim=True) - math.log(count)
    carried = weights.log_weights.gather(1, ancestors)
    return Weights(
        torch.where(rearrange(rows, "p -> p 1"), mean.expand_as(carried), carried),
        weights.spent.gather(1, ancestors),
        weights.memory.gather(1, ancestors),
    )


# resampling: normalised weights (P, K) and uniform numbers in [0, 1) -> ancestors (P, K); K w copies in expectation


def systematic(shares: Tensor, uniform: Tensor) -> Tensor:
    """One uniform number (P, 1) and K equal steps from it: floor or ceil of K w copies."""
    count = shares.shape[1]
    return _inverse(shares, (uniform[:, :1] + torch.arange(count).to(uniform)) / count)


def multinomial(shares: Tensor, uniform: Tensor) -> Tensor:
    """K independent draws, uniform (P, K)."""
    return _inverse(shares, uniform)


def _inverse(shares: Tensor, places: Tensor) -> Tensor:
    cumulated = shares.cumsum(dim=1)
    cumulated = cumulated / cumulated[:, -1:]
    return torch.searchsorted(cumulated, places.clamp_max(NOT_ABOVE).contiguous(), right=True)


def ssp(shares: Tensor, uniform: Tensor) -> Tensor:
    """Srinivasan sampling process (Gerber, Chopin and Whiteley, 1708.04221): floor or ceil of K w copies; uniform
    (P, K), of which K - 1 are used.

    Two particles play for their fractional parts until one of them is 0 or 1; the other plays the next.
    """
    prompts, count = shares.shape
    rows = torch.arange(prompts, device=shares.device)
    copies = (count * shares).floor()
    part = count * shares - copies
    held, at_stake = torch.zeros_like(rows), part[:, 0]
    for k in range(1, count):
        other, total = part[:, k], at_stake + part[:, k]
        small = total < 1.0
        chance = torch.where(small, at_stake / total.clamp_min(1e-300), (1.0 - other) / (2.0 - total))
        held_wins = uniform[:, k - 1] < chance
        newcomer = torch.full_like(held, k)
        winner, loser = torch.where(held_wins, held, newcomer), torch.where(held_wins, newcomer, held)
        copies[rows, winner] += torch.where(small, 0.0, 1.0).to(copies)
        held, at_stake = torch.where(small, winner, loser), torch.where(small, total, total - 1.0)
    copies[rows, held] += at_stake.round()
    middles = repeat(torch.arange(count).to(copies) + 0.5, "k -> p k", p=prompts).contiguous()
    return torch.searchsorted(copies.cumsum(dim=1), middles)


RESAMPLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "systematic": systematic,
    "multinomial": multinomial,
    "ssp": ssp,
}


def ancestors_of(kind: Resampling, log_weights: Tensor, rows: Tensor, rng: list[torch.Generator]) -> Tensor:
    """(P, K) int64 whose copy each particle becomes; itself where a prompt is not resampled.

    Args:
        rows: (P,) bool, the prompts that are.
        rng: one generator per prompt; only those of resampled prompts are drawn from.
    """
    count = log_weights.shape[1]
    stay = torch.arange(count).expand_as(log_weights)
    drawn = [
        torch.rand(count, generator=one, device=one.device, dtype=torch.float64).cpu() if again else torch.zeros(count)
        for one, again in zip(rng, rows.tolist(), strict=True)
    ]
    chosen = RESAMPLINGS[kind](log_weights.softmax(dim=1), torch.stack(drawn).to(log_weights))
    return torch.where(rearrange(rows, "p -> p 1"), chosen, stay)


# tempering of DAS (2501.05803)


def tempering_rate(num_steps: int) -> float:
    """The gamma with which the tempering reaches 1 exactly at the end of `num_steps`: 2^(1 / n) - 1."""
    return 2.0 ** (1.0 / num_steps) - 1.0


def tempered(index: int, gamma: float) -> float:
    """min(1, (1 + gamma)^i - 1): how much of the reward counts after i steps; 0 at the start."""
    return min(1.0, (1.0 + gamma) ** index - 1.0)


def twist(latents: Tensor, mean: Tensor, shift: Tensor, std: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B,) log N(x | mean, std) - log N(x | mean + shift, std) over the free positions of latents (B, ...): what a
    particle that was drawn with a shifted mean is weighted by."""
    return reduce_positions(shift * (shift - 2.0 * (latents - mean)) / (2.0 * std**2), mask, "sum")
