"""What steers sampling: rewards of media and of latents at any noise level, with the weights of one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from alignkit.errors import RecipeError
from alignkit.rewards import Weighted
from alignkit.rewards.base import BrokenContract, NoiseAware, RewardFailure, ScoresGroups
from alignkit.types import Scores

Spec = str | Callable[..., Any]


class Judges:
    """Rewards with weights, and rewards that are only reported.

    Args:
        rewards: {spec or callable: weight}, or one spec or callable.
        extra: specs or callables that are scored with weight 0.

    Attributes:
        weighted: those that steer; where every weight is 0, all of `rewards`.
        reported: the others, which are asked about chosen samples only; None: there are none.
    """

    def __init__(self, rewards: Mapping[Any, float] | Spec, extra: Iterable[Spec] = ()) -> None:
        own = list(rewards.items()) if isinstance(rewards, Mapping) else [(rewards, 1.0)]
        every = Weighted([*own, *((one, 0.0) for one in extra)])  # refuses what it cannot load, and a name used twice
        known = [(reward, every.weights[name]) for name, reward in every.rewards.items()]
        steering = [one for one in known if one[1] != 0] or known[: len(own)]
        chosen = {id(reward) for reward, _ in steering}
        rest = [one for one in known if id(one[0]) not in chosen]
        self.weighted, self.reported = Weighted(steering), Weighted(rest) if rest else None
        together = [reward.name for reward in every.rewards.values() if isinstance(reward, ScoresGroups)]
        if together:
            raise RecipeError(
                f"{', '.join(together)} compares samples of one prompt with each other, and guidance asks about single "
                "samples at different times; guide with a reward that scores one sample, and compare afterwards"
            )

    @property
    def weights(self) -> dict[str, float]:
        """By reward name; 0 for those that are only reported."""
        return {name: weight for some in self._both for name, weight in some.weights.items()}

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

    def require_steering(self, method: str) -> None:
        """Raise RecipeError where no reward has a say."""
        if not self.steering:
            raise RecipeError(f"all rewards have weight 0, so {method!r} has nothing to follow; give one a weight")

    def require_differentiable(self, method: str) -> None:
        """Raise where a reward with a say in the total gives no gradient.

        Raises:
            RecipeError: there is none; or names the rewards, and methods that need no gradient.
        """
        self.require_steering(method)
        without = [name for name, reward in self.steering.items() if not reward.differentiable]
        if without:
            raise RecipeError(
                f"method {method!r} follows gradients and {', '.join(without)} gives none; use method='fk', "
                "'best_of_n' or 'search', which take any reward, or a differentiable reward"
            )

    def bind(self, policy: Any) -> None:
        """Hand the policy to rewards that are part of the generator or read its features, and read all weights."""
        for some in self._both:
            some.bind(policy)
            some.prepare()

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises RewardError before anything is sampled if a prompt lacks what a reward needs of it."""
        for some in self._both:
            some.check_prompts(prompts)

    @property
    def _both(self) -> list[Weighted]:
        return [some for some in (self.weighted, self.reported) if some is not None]

    def scores(self, media: torch.Tensor, latents: torch.Tensor, cond: Any) -> Scores:
        """Scores of B samples by what steers; noise-aware rewards score the latents as clean.

        Args:
            media: (B, 3, H, W) or (B, T, 3, H, W) in [0, 1], what `latents` (B, ...) decode to.
            cond: their `Conditioning`.
        """
        return self.weighted(media, cond.prompts, latents, cond)

    def with_reported(self, scores: Scores, media: torch.Tensor, latents: torch.Tensor, cond: Any) -> Scores:
        """The scores of B samples, with those of the rewards that are only reported."""
        if self.reported is None:
            return scores
        more = self.reported(media, cond.prompts, latents, cond)
        return Scores(scores.total, {**scores.parts, **more.parts}, {**scores.failed, **more.failed})

    def at_level(self, latents: torch.Tensor, sigma: torch.Tensor | float, cond: Any) -> torch.Tensor:
        """(B,) weighted sum of the noise-aware rewards at noise level `sigma`, a number or (B,); gradients flow."""
        level = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).expand(len(latents))
        total = torch.zeros(len(latents), device=latents.device, dtype=latents.dtype)
        for name, reward in self.noisy.items():
            value = reward(latents, level, cond)
            if value.shape != total.shape:
                raise BrokenContract(
                    f"noise-aware reward {name!r} returned {tuple(value.shape)} for {len(latents)} samples; expected "
                    f"{tuple(total.shape)}"
                )
            if not bool(value.detach().isfinite().all()):
                row = int((~value.detach().isfinite()).nonzero()[0])
                raise RewardFailure(
                    f"noise-aware reward {name!r} returned {float(value[row])} at noise level {float(level[row]):.3f} "
                    f"for prompt {str(cond.prompts[row])!r}; expected a finite number: load it in float32 or bfloat16, "
                    "or keep to the noise levels that it was trained on"
                )
            total = total + self.weights[name] * value
        return total
