"""What a reward claims of itself, tried on one batch before a run depends on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alignkit.errors import RewardError
from alignkit.rewards.base import Reward, evaluate

log = logging.getLogger("alignkit.rewards")


@dataclass(frozen=True)
class Probe:
    """What was seen.

    Attributes:
        difference: largest difference between two calls with the same input; 0 for a deterministic reward.
        gradient: largest absolute gradient at the media; None where the reward promises none.
    """

    difference: float
    gradient: float | None


def probe(reward: Reward, media: torch.Tensor, prompts: Sequence[str]) -> Probe:
    """Call a reward twice, and once backwards if it says that it is differentiable.

    Args:
        media: a real batch, as for `evaluate`.

    Raises:
        RewardError: a differentiable reward without a gradient, or with one that is 0 or not finite
            everywhere.
    """
    first, second = (evaluate(reward, media.detach(), prompts).scores.detach() for _ in range(2))
    both = first.isfinite() & second.isfinite()
    difference = float((first - second)[both].abs().max()) if both.any() else 0.0
    if difference > 0:
        log.warning("reward %r differs by up to %.3g between two calls with the same input", reward.name, difference)
    return Probe(difference, _largest_gradient(reward, media, prompts) if reward.differentiable else None)


def _largest_gradient(reward: Reward, media: torch.Tensor, prompts: Sequence[str]) -> float:
    with torch.enable_grad():
        leaf = media.detach().clone().requires_grad_()
        scores = evaluate(reward, leaf, prompts).scores
        (gradient,) = torch.autograd.grad(scores[scores.isfinite()].sum(), leaf, allow_unused=True)
    largest = 0.0 if gradient is None else float(gradient.abs().max())
    if largest == 0 or not torch.isfinite(torch.tensor(largest)):
        raise RewardError(
            f"reward {reward.name!r} says differentiable=True, but its largest gradient at the media is "
            f"{largest}; set differentiable=False or repair the path to the media"
        )
    return largest
