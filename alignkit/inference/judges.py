"""What steers sampling: rewards of media and of latents at any noise level, with the weights of one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from alignkit.errors import RecipeError
from alignkit.rewards import Weighted
from alignkit.rewards.base import NoiseAware
from alignkit.types import Scores

Spec = str | Callable[..., Any]


class Judges:
    """Rewards with weights, and rewards that are only reported.

    Args:
        rewards: {spec or callable: weight}, or one spec or callable.
        extra: specs or callables that are scored with weight 0.

    Attributes:
        weighted: all of them.
    """

    def __init__(self, rewards: Mapping[Any, float] | Spec, extra: Iterable[Spec] = ()) -> None:
        own = list(rewards.items()) if isinstance(rewards, Mapping) else [(rewards, 1.0)]
        self.weighted = Weighted([*own, *((one, 0.0) for one in extra)])

    @property
    def weights(self) -> dict[str, float]:
        """By reward name."""
        return self.weighted.weights

    @property
    def steering(self) -> dict[str, Any]:
        """The rewards with a say in the total, by name."""
        return {name: reward for name, reward in self.weighted.rewards.items() if self.weights[name] != 0}

    @property
    def noisy(self) -> dict[str, NoiseAware]:
        """Those of them that can be asked at any noise level."""
        return {n: r for n, r in self.steering.items() if isinstance(r, NoiseAware) and r.noise_aware}

    @property
    def differentiable(self) -> bool:
        """Whether the total gives gradients."""
        return self.weighted.differentiable

    def require_differentiable(self, method: str) -> None:
        """Raise where a reward with a say in the total gives no gradient.

        Raises:
            RecipeError: names the rewards and methods that need none.
        """
        without = [name for name, reward in self.steering.items() if not reward.differentiable]
        if without:
            raise RecipeError(
                f"method {method!r} follows gradients and {', '.join(without)} gives none; use method='fk', "
                "'best_of_n' or 'search', which take any reward, or a differentiable reward"
            )

    def bind(self, policy: Any) -> None:
        """Hand the policy to rewards that are part of the generator or read its features, and read all weights."""
        self.weighted.bind(policy)
        self.weighted.prepare()

    def scores(self, media: torch.Tensor, latents: torch.Tensor, cond: Any) -> Scores:
        """Scores of B samples; noise-aware rewards score the latents as clean.

        Args:
            media: (B, 3, H, W) or (B, T, 3, H, W) in [0, 1], what `latents` (B, ...) decode to.
            cond: their `Conditioning`.
        """
        return self.weighted(media, cond.prompts, latents, cond)

    def at_level(self, latents: torch.Tensor, sigma: torch.Tensor | float, cond: Any) -> torch.Tensor:
        """(B,) weighted sum of the noise-aware rewards at noise level `sigma`, a number or (B,); gradients flow."""
        level = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).expand(len(latents))
        total = torch.zeros(len(latents), device=latents.device, dtype=latents.dtype)
        for name, reward in self.noisy.items():
            total = total + self.weights[name] * reward(latents, level, cond)
        return total
