"""The Gaussian of one sampling step: sampled from, scored, compared with the reference.

A transition owns its std, so `log_prob` and `kl` cannot lose a factor of dt. Sampling and training build it
with the same `Noise`, from the same latents, so the ratio before the first update is exactly 1.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from alignkit.errors import AlignkitError, RecipeError
from alignkit.flow import steps
from alignkit.flow.path import Path, Sigma, as_coefficient, at_least_float32, expand_to
from alignkit.flow.steps import TRANSITIONS, StepCoefficients

Reduce = Literal["mean", "sum"]
KLForm = Literal["gaussian", "no_dt", "velocity"]
Rng = torch.Generator | list[torch.Generator]

KL_FORMS: tuple[str, ...] = get_args(KLForm)


@dataclass(frozen=True)
class Transition:
    """N(mean, std^2) over the next latents.

    Attributes:
        mean: (B, ...) float32 or float64.
        std: 0-d, (B,) or broadcastable with as many axes as `mean`; 0 for a deterministic step.
        mask: as many axes as `mean`, broadcastable, bool or float: 1 = free, 0 = fixed. Fixed positions get
            no noise and leave the sums and means of `log_prob` and `kl`.
        velocity: (B, ...) the velocity it was built from; only KL form `velocity` needs it.
        dt: sigma_next - sigma, below 0, 0-d or (B,); only KL form `no_dt` needs it.
        unscaled: score with -(x - mean)^2, as the published CPS code does, instead of the Gaussian density.
    """

    mean: Tensor
    std: Tensor
    mask: Tensor | None = None
    velocity: Tensor | None = None
    dt: Tensor | None = None
    unscaled: bool = False

    def __post_init__(self) -> None:
        if self.mask is None:
            return
        fits = self.mask.ndim == self.mean.ndim and all(
            have in (1, want) for have, want in zip(self.mask.shape, self.mean.shape, strict=True)
        )
        if not fits:
            raise RecipeError(
                f"mask of shape {tuple(self.mask.shape)} does not fit latents of shape "
                f"{tuple(self.mean.shape)}: give the same number of axes, each of the same size or 1"
            )

    def sample(self, rng: Rng | Tensor) -> Tensor:
        """Next latents (B, ...).

        Args:
            rng: one generator per sample (sample i then does not depend on the batch), one generator for the
                whole batch, or the standard normal noise itself, (B, ...).
        """
        noise = rng if isinstance(rng, Tensor) else draw_noise(self.mean, rng)
        if noise.shape != self.mean.shape:
            raise AlignkitError(f"noise of shape {tuple(noise.shape)} for a mean of {tuple(self.mean.shape)}")
        noise = noise.to(device=self.mean.device, dtype=self.mean.dtype)
        if self.mask is not None:
            noise = noise * self.mask.to(device=noise.device, dtype=noise.dtype)
        return self.mean + expand_to(self.std, self.mean) * noise

    def log_prob(self, x: Tensor, reduce: Reduce) -> Tensor:
        """(B,) log-density of `x` (B, ...), summed or averaged over the free positions.

        The mean makes clips of 1e-4 sensible, the sum is the textbook ratio; the choice rescales clip and KL.
        With `unscaled` the density is replaced by -(x - mean)^2.
        """
        if x.shape != self.mean.shape:
            raise AlignkitError(f"latents of shape {tuple(x.shape)} for a mean of {tuple(self.mean.shape)}")
        std = self._positive_std("log_prob")
        squared = (x.to(self.mean.dtype) - self.mean) ** 2
        if self.unscaled:
            return reduce_positions(-squared, self.mask, reduce)
        density = -squared / (2.0 * std**2) - std.log() - 0.5 * math.log(2.0 * math.pi)
        return reduce_positions(density, self.mask, reduce)

    def kl(self, reference: Transition, reduce: Reduce, form: KLForm = "gaussian") -> Tensor:
        """(B,) divergence from `reference`, which has the same std; gradients flow into both.

        Forms:
            gaussian: |mean - mean_ref|^2 / (2 std^2), the true KL of the step.
            no_dt: |mean - mean_ref|^2 / (2 g^2), std = g sqrt(-dt): what Flow-GRPO's published coefficients
                assume.
            velocity: |v - v_ref|^2.
        """
        if form == "velocity":
            if self.velocity is None or reference.velocity is None:
                raise AlignkitError("KL form 'velocity' needs transitions that carry their velocity")
            return reduce_positions((self.velocity - reference.velocity) ** 2, self.mask, reduce)
        if form not in KL_FORMS:
            raise RecipeError(f"KL form {form!r} is not known; expected one of {', '.join(KL_FORMS)}")
        std = self._positive_std(f"KL form {form!r}")
        if not torch.equal(std, expand_to(reference.std, reference.mean)):
            raise AlignkitError("the two transitions differ in std: build both from the same step and noise")
        variance = std**2
        if form == "no_dt":
            if self.dt is None:
                raise AlignkitError("KL form 'no_dt' needs a transition that carries its dt")
            variance = variance / expand_to(self.dt.abs(), self.mean)
        return reduce_positions((self.mean - reference.mean) ** 2 / (2.0 * variance), self.mask, reduce)

    def _positive_std(self, asker: str) -> Tensor:
        std = expand_to(self.std, self.mean)
        if not bool((std > 0).all()):
            raise AlignkitError(
                f"{asker} of a step without noise: std is 0, so there is no density. Score stochastic steps "
                "only (not ode, noise level 0, the last step of cps or ddim, or the first of stepwise)"
            )
        return std


def reduce_positions(values: Tensor, mask: Tensor | None, reduce: Reduce) -> Tensor:
    """(B,) sum or mean of `values` (B, ...) over all axes but the first, counting free positions only.

    Always over explicit axes: `x.mean(dim=())` would reduce the batch too.
    """
    if reduce not in ("mean", "sum"):
        raise RecipeError(f"reduce={reduce!r} is not known; expected 'mean' or 'sum'")
    flat = rearrange(values, "b ... -> b (...)")
    if mask is None:
        return flat.mean(dim=1) if reduce == "mean" else flat.sum(dim=1)
    free = mask.to(device=values.device, dtype=values.dtype).expand_as(values)
    free = rearrange(free, "b ... -> b (...)")
    total = torch.where(free > 0, flat, 0.0).mul(free).sum(dim=1)
    if reduce == "sum":
        return total
    count = free.sum(dim=1)
    if not bool((count > 0).all()):
        raise AlignkitError("a sample has no free position: its mask is 0 everywhere; leave it out")
    return total / count


def draw_noise(like: Tensor, rng: Rng) -> Tensor:
    """Standard normal noise (B, ...) shaped, typed and placed as `like`, drawn on the generators' own
    device."""
    if isinstance(rng, torch.Generator):
        return torch.randn(like.shape, generator=rng, device=rng.device, dtype=like.dtype).to(like.device)
    if len(rng) != like.shape[0]:
        raise AlignkitError(f"{len(rng)} generators for {like.shape[0]} samples: give one, or one per sample")
    rows = [torch.randn(like.shape[1:], generator=one, device=one.device, dtype=like.dtype) for one in rng]
    return torch.stack([row.to(like.device) for row in rows])


def renoised(path: Path, x: Tensor, sigma: Sigma, sigma_back: Sigma, eps: Tensor) -> Tensor:
    """Latents x (B, ...) at noise level `sigma` taken back to the higher level `sigma_back` with noise eps (B, ...):
    `a x + sqrt(sigma_back^2 - a^2 sigma^2) eps`, a = alpha_back / alpha. It keeps the marginals."""
    low, high = as_coefficient(sigma), as_coefficient(sigma_back)
    kept = path.alpha(high) / path.alpha(low)
    added = (high**2 - kept**2 * low**2).clamp_min(0.0).sqrt()
    return expand_to(kept, x) * x + expand_to(added, x) * eps


def build(
    path: Path,
    x: Tensor,
    v: Tensor,
    sigma: Sigma,
    sigma_next: Sigma,
    coefficients: StepCoefficients,
    mask: Tensor | None = None,
    unscaled: bool = False,
) -> Transition:
    """The transition with `coefficients` at latents `x` (B, ...) and velocity `v` (B, ...)."""
    x, v = at_least_float32(x), at_least_float32(v)
    if x.shape != v.shape:
        raise AlignkitError(f"velocity of shape {tuple(v.shape)} for latents of shape {tuple(x.shape)}")
    mean = expand_to(coefficients.latents, x) * x + expand_to(coefficients.velocity, x) * v
    dt = as_coefficient(sigma_next) - as_coefficient(sigma)
    place = {"device": mean.device, "dtype": mean.dtype}
    return Transition(mean, coefficients.std.to(**place), mask, v, dt.to(**place), unscaled)


def ode(
    path: Path, x: Tensor, v: Tensor, sigma: Sigma, sigma_next: Sigma, mask: Tensor | None = None
) -> Transition:
    """The deterministic step, std 0."""
    return build(path, x, v, sigma, sigma_next, steps.ode(path, sigma, sigma_next), mask)


def flow_sde(
    path: Path,
    x: Tensor,
    v: Tensor,
    sigma: Sigma,
    sigma_next: Sigma,
    level: float,
    sigma_max: Sigma,
    mask: Tensor | None = None,
) -> Transition:
    """`steps.flow_sde` at `x`; `sigma_max` is the second value of the schedule."""
    coefficients = steps.flow_sde(path, sigma, sigma_next, level, sigma_max)
    return build(path, x, v, sigma, sigma_next, coefficients, mask)


def dance_sde(
    path: Path,
    x: Tensor,
    v: Tensor,
    sigma: Sigma,
    sigma_next: Sigma,
    level: float,
    mask: Tensor | None = None,
) -> Transition:
    """`steps.dance_sde` at `x`."""
    return build(path, x, v, sigma, sigma_next, steps.dance_sde(path, sigma, sigma_next, level), mask)


def cps(
    path: Path,
    x: Tensor,
    v: Tensor,
    sigma: Sigma,
    sigma_next: Sigma,
    level: float,
    scaled: bool = True,
    mask: Tensor | None = None,
) -> Transition:
    """`steps.cps` at `x`; `scaled=False` scores as the published code does."""
    coefficients = steps.cps(path, sigma, sigma_next, level)
    return build(path, x, v, sigma, sigma_next, coefficients, mask, unscaled=not scaled)


def ddim(
    path: Path,
    x: Tensor,
    v: Tensor,
    sigma: Sigma,
    sigma_next: Sigma,
    level: float,
    mask: Tensor | None = None,
) -> Transition:
    """`steps.ddim` at `x`; `level` is eta."""
    return build(path, x, v, sigma, sigma_next, steps.ddim(path, sigma, sigma_next, level), mask)


@dataclass(frozen=True)
class Noise:
    """Which stochastic step, and how much noise: what a plan uses where it samples.

    Attributes:
        kind: a name of `TRANSITIONS`.
        level: flow_sde a (published 0.7), dance_sde g (0.3), cps a in [0, 1] (0.8), ddim eta (1.0),
            stepwise eta (1.0); 0 for ode. Level 0 makes every kind the ODE.
        scaled: False scores cps as its published code does, -(x - mean)^2.
    """

    kind: str = "flow_sde"
    level: float = 0.7
    scaled: bool = True

    def __post_init__(self) -> None:
        if self.kind not in TRANSITIONS:
            near = difflib.get_close_matches(self.kind, TRANSITIONS, n=1, cutoff=0.0)[0]
            raise RecipeError(
                f"noise kind {self.kind!r} is not known; nearest: {near!r}; all: {', '.join(TRANSITIONS)}"
            )
        if not (math.isfinite(self.level) and self.level >= 0.0):
            raise RecipeError(f"noise level {self.level} must be a number of at least 0")
        if self.kind == "ode" and self.level != 0.0:
            raise RecipeError(f"noise kind 'ode' has no noise but level={self.level} was given; use level=0")
        if self.kind == "cps" and self.level > 1.0:
            raise RecipeError(f"cps level {self.level} is outside [0, 1]; published: 0.8")
        if not self.scaled and self.kind != "cps":
            raise RecipeError(f"scaled=False is the published scoring of 'cps' only; kind is {self.kind!r}")

    @property
    def deterministic(self) -> bool:
        """Whether this adds no noise anywhere."""
        return self.level == 0.0

    def coefficients(self, path: Path, sigma: Sigma, sigma_next: Sigma, sigma_max: Sigma) -> StepCoefficients:
        """The step as numbers; `sigma_max` is the second value of the schedule (only flow_sde reads it)."""
        return TRANSITIONS[self.kind](path, sigma, sigma_next, self.level, sigma_max)

    def build(
        self,
        path: Path,
        x: Tensor,
        v: Tensor,
        sigma: Sigma,
        sigma_next: Sigma,
        sigma_max: Sigma,
        mask: Tensor | None = None,
    ) -> Transition:
        """The transition from latents `x` (B, ...) with velocity `v` (B, ...); see `coefficients`."""
        coefficients = self.coefficients(path, sigma, sigma_next, sigma_max)
        return build(path, x, v, sigma, sigma_next, coefficients, mask, unscaled=not self.scaled)


ODE = Noise("ode", 0.0)


def per_sample_generators(rng: torch.Generator, count: int) -> list[torch.Generator]:
    """`count` generators on the device of `rng`, seeded by it in order: the first n do not depend on
    count."""
    seeds = [int(torch.randint(2**62, (), generator=rng, device=rng.device)) for _ in range(count)]
    return [torch.Generator(rng.device).manual_seed(seed) for seed in seeds]
