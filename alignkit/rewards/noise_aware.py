"""A reward of latents at any noise level: one dimension of a head on the generator's own first blocks."""

from __future__ import annotations

import dataclasses
import weakref
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from alignkit.errors import RecipeError
from alignkit.rewards.card import Card
from alignkit.rewards.noisy_head import CONFIG, WEIGHTS, HeadConfig, NoisyScorer, ShowsFeatures
from alignkit.rewards.weights import Files, locate

SHIPPED = "shipped:assets/signs/noisy"


@dataclass(frozen=True, eq=False)
class NoiseAwareReward:
    """One dimension of a head that was trained on noised latents (`recipes/sign_noisy.py` shows how).

    It reads the hidden states of the generator that it is bound to, so it scores only what this generator makes.
    Dimensions of one folder that are bound to one policy share one head, and one forward for the same latents.

    Attributes:
        weights: the folder that the recipe's run wrote, a hub id, or `shipped:...`.
        dimension: which of the head's; may be left out where it has one.
        name: in metrics and reports; "": the dimension.
    """

    weights: str = SHIPPED
    dimension: str = ""
    name: str = ""
    policy: ShowsFeatures | None = field(default=None, repr=False)

    kind: ClassVar[str] = "latent"
    differentiable: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        family="self",
        summary="noised latents that a head on the generator's own first blocks prefers; guides sampling (`nrg`)",
        range="any number; differences are log odds",
        licence="Apache-2.0 (ships with alignkit; for its sign generator only)",
        cost="the first blocks of the denoiser and 0.3 M parameters",
        source="Flow-NRG, VideoAlign 2501.13918; query attention: PRFL 2511.21541",
    )

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.dimension or "noise_aware")

    @property
    def noise_aware(self) -> bool:
        """False for a head that was trained on clean latents only: it scores them and cannot guide."""
        return self._config.noise is not None

    @property
    def noise(self) -> tuple[float, float] | None:
        """The noise levels that it was trained on; None: clean latents."""
        return self._config.noise

    def files(self) -> tuple[Files, ...]:
        """The head's folder."""
        return (Files(self.weights, (CONFIG, WEIGHTS)),)

    def prepare(self) -> None:
        """Read the folder; where a policy is bound, the weights too."""
        _ = self._column
        if self.policy is not None:
            _ = self._scorer

    def bind(self, policy: Any) -> NoiseAwareReward:
        """The same reward, reading this policy's generator.

        Raises:
            RecipeError: a generator of another class than the head was trained on, or nothing that shows features.
        """
        if not isinstance(policy, HasFeatures):
            raise RecipeError(
                f"reward {self.name!r} reads hidden states of a generator; {type(policy).__name__} shows none"
            )
        bound = dataclasses.replace(self, policy=policy)
        bound.prepare()
        return bound

    def describe(self) -> dict[str, Any]:
        """Which head, and what it was trained on."""
        return {"weights": self.weights, "dimension": self.dimension, "noise": self.noise}

    @cached_property
    def _folder(self) -> Path:
        return locate(self.files()[0])

    @cached_property
    def _config(self) -> HeadConfig:
        return HeadConfig.read(self._folder / CONFIG)

    @cached_property
    def _column(self) -> int:
        known = self._config.dimensions
        if not self.dimension and len(known) == 1:
            return 0
        if self.dimension not in known:
            raise RecipeError(
                f"reward noise_aware: dimension={self.dimension!r}; the head in {self.weights} judges "
                f"{', '.join(known)}: noise_aware(dimension={known[0]!r})"
            )
        return known.index(self.dimension)

    @cached_property
    def _scorer(self) -> NoisyScorer:
        assert self.policy is not None
        return shared(self._folder, self.policy)

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
        """(B,) float32 of latents (B, ...) at noise levels sigma (B,), 1 = noise; gradients flow to the latents.

        Args:
            cond: their `Conditioning`, of B samples.
        """
        if self.policy is None:
            raise RecipeError(
                f"reward {self.name!r} reads a generator's hidden states and has none; a run binds it, elsewhere "
                "call bind(policy)"
            )
        if len(latents) == 0:
            return latents.new_empty(0, dtype=torch.float32)
        return self._scorer.once(self.policy, latents, sigma, cond)[:, self._column]


@runtime_checkable
class HasFeatures(Protocol):
    """What `ShowsFeatures` says, as far as an object can be asked."""

    pipe: Any

    def features(self, x: torch.Tensor, t: torch.Tensor, cond: Any, depth: int, blocks: Any = None) -> torch.Tensor: ...


_SCORERS: weakref.WeakKeyDictionary[Any, dict[Path, weakref.ref[NoisyScorer]]] = weakref.WeakKeyDictionary()
"""What is loaded, by policy and folder, as long as a reward holds it."""


def shared(folder: Path, policy: ShowsFeatures) -> NoisyScorer:
    """The head of this folder on this policy; loaded once while in use."""
    held = _SCORERS.setdefault(policy, {})
    found = held[folder]() if folder in held else None
    if found is None:
        found = NoisyScorer.load(folder, policy)
        held[folder] = weakref.ref(found)
    return found


def write_random(folder: Path, policy: ShowsFeatures, config: HeadConfig) -> None:
    """An untrained head in the layout of a trained one, to try what reads it."""
    NoisyScorer.of(config, policy).save(folder)
