"""SOLACE: how well the generator's own denoiser recovers noise put on its picture (2603.00918)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from alignkit.errors import RecipeError
from alignkit.flow.path import RectifiedFlow
from alignkit.rewards.card import Card
from alignkit.types import Prompt

Velocity = Callable[[torch.Tensor, float], torch.Tensor]  # (latents (B, ...), sigma) -> dx/dsigma (B, ...)


@runtime_checkable
class Denoises(Protocol):
    """What SOLACE needs of the generator; `alignkit.Policy` has it."""

    path: Any

    def condition(self, prompts: Sequence[str], num_steps: int = ..., seed: Any = ..., **call: Any) -> Any: ...

    def timestep_of(self, sigma: torch.Tensor | float) -> torch.Tensor: ...

    def velocity(self, x: torch.Tensor, t: torch.Tensor | float, cond: Any) -> torch.Tensor: ...


def probes(prompt: Prompt, seed: int, count: int, shape: Sequence[int]) -> torch.Tensor:
    """(count, *shape) standard normal noise in antithetic pairs, the same for every sample of one prompt: a group's
    scores then differ by its pictures and not by its noise."""
    key = hashlib.sha256(f"{seed} {prompt.id}".encode()).digest()[:7]
    rng = torch.Generator().manual_seed(int.from_bytes(key, "big"))
    half = torch.randn(count // 2, *shape, generator=rng)
    return torch.cat([half, -half])


def self_confidence(
    velocity: Velocity, z0: torch.Tensor, eps: torch.Tensor, sigma: float, delta: float = 1e-6
) -> torch.Tensor:
    """(B,) S = -log(mean over K probes of |v(z_sigma) + z0 - eps|^2 + delta), z_sigma = (1 - sigma) z0 + sigma eps.

    The squared norm is the mean over positions, so that S does not depend on the size of the latents.

    Args:
        z0: (B, ...) clean latents.
        eps: (B, K, ...) noise.
        sigma: in (0, 1].
    """
    errors = []
    for probe in eps.unbind(dim=1):
        residual = velocity((1 - sigma) * z0 + sigma * probe, sigma) + z0 - probe
        errors.append(residual.flatten(1).square().mean(dim=1))
    return -torch.log(torch.stack(errors).mean(dim=0) + delta)


@dataclass(frozen=True, eq=False)
class Solace:
    """The generator's confidence in its own latents, without guidance, by the weights that are being trained.

    It is a reward of the base model's taste: it rises towards what the model finds easy, pictures without texture in
    the end. Use it beside another reward and with a KL, and train the later steps only (the paper: the last 60 %).

    Attributes:
        probes: K, noises per noise level, in antithetic pairs; the samples of one prompt share them.
        sigmas: noise levels whose S are averaged.
        delta: keeps the logarithm finite.
        call: the pipeline's keywords that shape its latents, as the run's `call` (height, width, ...).
        seed: of the probes.
    """

    probes: int = 8
    sigmas: tuple[float, ...] = (0.25, 0.5, 0.75)
    delta: float = 1e-6
    call: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    name: str = "solace"
    policy: Denoises | None = field(default=None, repr=False)

    kind = "latent"
    differentiable = False
    card: ClassVar[Card] = Card(
        family="self",
        summary="the denoiser recovers noise put on the latents: the base model finds them likely",
        range="any number; 0 is as bad as predicting nothing",
        cost="probes x sigmas denoiser calls (24)",
        source="SOLACE 2603.00918",
    )

    def __post_init__(self) -> None:
        if self.probes < 2 or self.probes % 2:
            raise RecipeError(f"probes={self.probes}; antithetic pairs need an even number, at least 2 (usual 8)")
        if not self.sigmas or not all(0 < sigma <= 1 for sigma in self.sigmas):
            raise RecipeError(f"sigmas={self.sigmas}; expected noise levels above 0 and at most 1, such as (0.5,)")

    def bind(self, policy: Any) -> Solace:
        """The same reward with the policy whose confidence it measures.

        Raises:
            RecipeError: the policy's path is not rectified flow, for which the formula holds.
        """
        if not isinstance(policy, Denoises):
            raise RecipeError(f"solace needs a policy with condition, timestep_of and velocity, not {type(policy)}")
        if not isinstance(policy.path, RectifiedFlow):
            raise RecipeError(
                f"solace is defined for rectified flow (v = eps - x0); this pipeline's path is "
                f"{type(policy.path).__name__}. Choose another reward"
            )
        return dataclasses.replace(self, policy=policy)

    def describe(self) -> dict[str, Any]:
        """Noise levels and keywords."""
        return {"sigmas": list(self.sigmas), "call": dict(self.call)}

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) of (B, ...) clean latents as `scheduler.step` sees them."""
        if self.policy is None:
            raise RecipeError("solace measures a policy and has none; a run binds it, elsewhere call bind(policy)")
        if len(media) == 0:
            return media.new_empty(0)
        policy, z0 = self.policy, media.float()
        # 2 steps are enough of a grid: velocities between its timesteps are what is asked for.
        cond = policy.condition(prompts, num_steps=2, seed=0, **self.call).unguided

        def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
            return policy.velocity(x, float(policy.timestep_of(sigma)), cond)

        eps = torch.stack([probes(p, self.seed, self.probes, z0.shape[1:]) for p in prompts]).to(z0.device)
        with torch.no_grad():
            levels = [self_confidence(velocity, z0, eps, sigma, self.delta) for sigma in self.sigmas]
        return torch.stack(levels).mean(dim=0)
