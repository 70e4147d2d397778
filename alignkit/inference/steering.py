"""Gradients of rewards with respect to latents, and the steering function of noisy reward guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.flow.guidance import Strength, norms, posterior_slope
from alignkit.flow.path import Path, at_least_float32, expand_to, x0_from_velocity
from alignkit.inference.task import Task, pieces_of
from alignkit.types import Steer, Step

Ask = Callable[[Tensor, float, Any], Tensor]
"""(latents (B, ...), sigma, conditioning of B samples) -> (B,) reward, with gradients."""
Clean = Callable[[Tensor, Any], Tensor]
"""(clean latents (B, ...), conditioning of B samples) -> (B,) reward, with gradients."""
Estimate = Callable[[Tensor, Any], Tensor]
"""(latents (B, ...), conditioning of B samples) -> clean estimate (B, ...), with gradients."""
Note = Callable[[str, Any], None]
Through = Literal["x0", "denoiser"]
"""What stands between latents and clean estimate: the slope of the denoiser for data of unit variance, or its own."""


def reward_gradient(reward: Clean, x: Tensor, cond: Any, batch: int | None = None) -> tuple[Tensor, Tensor]:
    """(values (B,), d value / d x (B, ...)) at latents x (B, ...), in float32 or what is finer, without a graph.

    Where the reward has no value (NaN) there is nothing to follow, and the gradient is 0.

    Args:
        batch: samples that are differentiated at once; None: all.

    Raises:
        AlignkitError: the reward does not depend on the latents through torch.
    """
    values, gradients = [], []
    with torch.enable_grad():
        for rows in pieces_of(len(x), batch or len(x)):
            own = at_least_float32(x[rows]).detach().requires_grad_()
            value = reward(own, cond[rows])
            values.append(value.detach())
            if bool(values[-1].isnan().all()):  # without any value there is no graph either
                gradients.append(torch.zeros_like(own))
                continue
            if not value.requires_grad:
                raise AlignkitError(
                    "the reward gives no gradient with respect to the latents: it, or the decoder, detaches or leaves "
                    "torch on the way; guide with method='fk' or 'best_of_n', which need none"
                )
            (gradient,) = torch.autograd.grad(value.sum(), own)
            gradients.append(gradient.masked_fill(expand_to(values[-1], gradient).isnan(), 0.0))
    return torch.cat(values), torch.cat(gradients)


def smoothed_gradient(
    reward: Clean, x0: Tensor, cond: Any, offsets: Sequence[Tensor], weight: float = 1.0, batch: int | None = None
) -> tuple[Tensor, Tensor]:
    """(values (B,), gradients (B, ...)) of `log mean exp(weight r(x0 + offset)) / weight` over k offsets (B, ...).

    LGD-MC (Song et al., ICML 2023): what the reward is when x0 is known up to the offsets. Their gradients are taken
    one offset after the other, so memory does not grow with k. Offsets without a value (NaN) are left out; where none
    has one, the value is NaN and the gradient 0.
    """
    found = [reward_gradient(reward, x0 + offset, cond, batch) for offset in offsets]
    values = torch.stack([value for value, _ in found])  # (k, B)
    missing = values.isnan()
    logits = (weight * values).masked_fill(missing, -torch.inf)
    shares = logits.softmax(dim=0).masked_fill(missing, 0.0)
    gradient = sum((expand_to(s, x0) * g for s, (_, g) in zip(shares, found, strict=True)), torch.zeros_like(x0))
    return (logits.logsumexp(dim=0) - (~missing).sum(dim=0).log()) / weight, gradient


def climbed(reward: Clean, x0: Tensor, cond: Any, steps: int, lr: float, batch: int | None = None) -> Tensor:
    """Delta (B, ...) after `steps` of gradient ascent on r(x0 + Delta) from 0 (universal guidance, 2302.07121)."""
    delta = torch.zeros_like(x0)
    for _ in range(steps):
        delta = delta + lr * reward_gradient(reward, x0 + delta, cond, batch)[1]
    return delta


def pulled_back(clean: Estimate, x: Tensor, cond: Any, gradient: Tensor, batch: int | None = None) -> Tensor:
    """d (gradient . clean(x)) / d x, (B, ...): `gradient` (B, ...) with respect to a clean estimate, carried to the
    latents x (B, ...) from which `clean` makes it."""
    pieces = []
    with torch.enable_grad():
        for rows in pieces_of(len(x), batch or len(x)):
            own = at_least_float32(x[rows]).detach().requires_grad_()
            pieces.append(torch.autograd.grad(clean(own, cond[rows]), own, gradient[rows])[0])
    return torch.cat(pieces)


def carried_to_latents(
    task: Task, step: Step, cond: Any, gradient: Tensor, through: Through, batch: int | None = None
) -> Tensor:
    """The gradient (B, ...) with respect to a step's latents from that with respect to their clean estimate."""
    path = task.policy.path
    if through == "x0":
        return expand_to(posterior_slope(path, step.sigma), gradient) * gradient

    def clean(x: Tensor, own: Any) -> Tensor:
        return x0_from_velocity(path, task.velocity(x, step.timestep, own), x, step.sigma)

    return pulled_back(clean, step.latents, cond, gradient, batch)


def shortened(x: Tensor, limit: float | None) -> Tensor:
    """`x` (B, ...) with the norm of each sample at most `limit`; None: no limit."""
    return x if limit is None else x * expand_to(limit / norms(x).clamp_min(limit), x)


def require_finite(gradient: Tensor, cond: Any, at: Step | str) -> None:
    """Raise AlignkitError, naming the step (or `at`, if it is a name) and the prompt, where a sample's gradient
    (B, ...) is not finite."""
    broken = (~gradient.flatten(1).isfinite().all(dim=1)).nonzero()
    if len(broken):
        prompt = cond.prompts[int(broken[0])]
        place = at if isinstance(at, str) else f"step {at.index} (sigma {at.sigma:.4f})"
        raise AlignkitError(
            f"the gradient of the reward is not finite at {place}, prompt {prompt.id} {str(prompt)!r}; usual causes: a "
            "denoiser, decoder or reward in float16 (load it in float32 or bfloat16), a square root or a logarithm at "
            "0 in the reward"
        )


def noisy_reward_steering(
    reward_at: Ask,
    cond: Any,
    path: Path,
    num_steps: int,
    strength: Strength,
    batch: int | None = None,
    note: Note | None = None,
) -> Steer:
    """Noisy reward guidance of the samples of `cond` (Flow-NRG, VideoAlign 2501.13918).

    Args:
        reward_at: a noise-aware reward, or a weighted sum of them.
        path: the policy's.
        num_steps: of the grid.
        batch: samples that are differentiated at once; None: all.
        note: told what every guided step did.
    """

    def steer(step: Step) -> Step:
        weight = strength.at(step.index, num_steps, step.sigma)
        if weight == 0:
            return step
        values, gradient = reward_gradient(lambda x, own: reward_at(x, step.sigma, own), step.latents, cond, batch)
        require_finite(gradient, cond, step)
        velocity = strength.guided(path, step.velocity, gradient, step.sigma, weight)
        return noted(step, velocity, values, note)

    return steer


def noted(step: Step, velocity: Tensor, values: Tensor | None, note: Note | None) -> Step:
    """The step with another velocity; `note` gets the mean reward, of those that have one, and how large the
    change is beside the velocity."""
    if note is not None:
        change = norms(velocity - step.velocity) / norms(step.velocity).clamp_min(1e-12)
        known = [] if values is None else values[values.isfinite()].tolist()
        reward = sum(known) / len(known) if known else None
        note("guidance", {"step": step.index, "sigma": step.sigma, "reward": reward, "change": float(change.mean())})
    return replace(step, velocity=velocity)
