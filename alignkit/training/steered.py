"""Training with a guide: noise-aware rewards whose gradient says at every noise level where the velocity should go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from alignkit.errors import RecipeError
from alignkit.inference.judges import Judges
from alignkit.rewards import load
from alignkit.rewards.base import NoiseAware
from alignkit.rewards.parts import bound, prepare
from alignkit.training.recipe import Recipe

if TYPE_CHECKING:
    from alignkit.policy import Conditioning, Policy


@dataclass(frozen=True)
class Steered(Recipe):
    """A method that learns from a guide.

    Attributes:
        guide: {spec or callable of a noise-aware reward: weight}, for example
            `'noise_aware(weights="folder", dimension="legibility")'`. Apart from `rewards`, which score what was drawn.
        guide_weight: of their weighted sum R, the w of the density `p(x) exp(w R(x))`.
        guide_clip: the change of the velocity is at most this many times the velocity, in norm and sample by sample;
            None: no limit.
    """

    guide: Mapping[Any, float] = field(default_factory=dict)
    guide_weight: float = 1.0
    guide_clip: float | None = None

    def validate(self) -> None:
        super().validate()
        check_guide(self.guide, type(self).__name__)
        if self.guide_weight < 0:
            raise RecipeError(
                f"guide_weight={self.guide_weight} must be at least 0; for less of a reward give it a weight below 0 "
                "in guide"
            )
        if self.guide_clip is not None and not self.guide_clip > 0:
            raise RecipeError(f"guide_clip={self.guide_clip} must be above 0 times the velocity's norm; None: no limit")

    def bound(self, policy: Policy) -> Recipe:
        guide: dict[Any, float] = {}
        for spec, weight in self.guide.items():
            reward: Any = bound(load(spec), policy)
            prepare(reward)
            guide[OfUntrained(reward, policy)] = weight
        return replace(self, guide=guide)

    def guide_reward(self, x: torch.Tensor, sigma: torch.Tensor | float, cond: Conditioning) -> torch.Tensor:
        """(B,) R of latents x (B, ...) at noise level sigma, a number or (B,); gradients flow."""
        return self._judges.at_level(x, sigma, cond)

    @cached_property
    def _judges(self) -> Judges:
        return Judges(self.guide)


@dataclass(frozen=True, eq=False)
class OfUntrained:
    """A noise-aware reward that reads the features of the untrained weights, so that it stays the same in training."""

    reward: NoiseAware
    policy: Policy
    kind: str = "latent"
    differentiable: bool = True

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def noise_aware(self) -> bool:
        return self.reward.noise_aware

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
        """As the reward."""
        with self.policy.reference():
            return self.reward(latents, sigma, cond)


def check_guide(guide: Mapping[Any, float], method: str) -> None:
    """Refuse what cannot say anything of noised latents.

    Raises:
        RecipeError: names it, says why and where it belongs.
    """
    if not any(guide.values()):
        raise RecipeError(
            f"guide={dict(guide)}: {method} learns from the gradient of a noise-aware reward; give one with a weight, "
            'such as \'noise_aware(weights="folder", dimension="legibility")\'; `alignkit run sign_noisy` trains one'
        )
    for spec in guide:
        reward: Any = load(spec)
        if isinstance(reward, NoiseAware) and reward.noise_aware:
            continue
        why = "was trained on clean latents only" if isinstance(reward, NoiseAware) else "scores finished media"
        raise RecipeError(
            f"guide: {reward.name!r} {why}, and {method} asks its guide at every noise level. Give a noise-aware "
            f"reward (`alignkit run sign_noisy` trains one); {reward.name!r} may stand in the rewards of GRPO or NFT"
        )
