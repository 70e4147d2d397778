"""Velocity-gradient matching: noisy reward guidance taught to the weights (VGG-Flow and residual grad-DB in one form).

1. Draw P prompts and G samples of each with the current weights and the deterministic sampler.
2. Take each sample to noise levels; R(x, sigma, c) is the weighted sum of the noise-aware rewards in `guide`.
3. target = v_ref(x) - guide_weight sigma / (1 - sigma) grad_x R: what noisy reward guidance would have sampled with
   (VideoAlign, 2501.13918; other paths through `flow.guidance`).
4. loss = mean squared error to the target, in the denoiser's own parametrisation. Average over samples and levels, clip
   the gradient, step.

If R is `log E[exp(r(x0)) | x]`, the value function, the minimum is the tilt `p_ref exp(guide_weight r)` for
guide_weight=1, sampled without a guide; for a learnt R it is whatever guidance by R samples. The target does not depend
on the trained weights, only where it is asked does, so training stops there: it has its anchor built in.

Scores weigh nothing: `rewards` are measured on every round's samples and reported. Trains the unguided output by
default. Without captions (`caption_dropout`) the target is the reference's.

Deviations from VGG-Flow, on purpose: the value function is a reward that was trained before and does not follow the
policy, so there is no consistency loss; levels at which the gradient's factor is singular are not drawn by default and
never count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from alignkit.errors import AlignkitError, RecipeError
from alignkit.flow import path as paths
from alignkit.flow.guidance import clipped, norms, velocity_change
from alignkit.flow.path import Path, Prediction, expand_to
from alignkit.inference.steering import reward_gradient
from alignkit.training.matching import Levels, Matching, errors, predict, reference_output
from alignkit.training.steered import Steered
from alignkit.types import Noised, Scores

if TYPE_CHECKING:
    from alignkit.policy import Conditioning, Policy
    from alignkit.training.update import Batch

SINGULAR = 0.999
"""From this noise level on nothing is learnt: the gradient's factor grows without limit."""


@dataclass(frozen=True)
class ValueGradient(Steered, Matching):
    """A run of velocity-gradient matching.

    Attributes:
        levels: noise levels of training, by default the sampler's own up to 0.98, where the gradient's factor is 49.
    """

    learns_from: ClassVar[Literal["rollouts", "samples", "pairs"]] = "samples"

    levels: Levels = field(default_factory=lambda: Levels(high=0.98))

    def validate(self) -> None:
        super().validate()
        if self.velocity_beta:
            raise RecipeError(
                f"velocity_beta={self.velocity_beta}: the target starts at the reference already, and an anchor to it "
                "only shrinks the guidance; use a smaller guide_weight"
            )
        if not self.guide_weight:
            raise RecipeError("guide_weight=0: the target is the reference, so there is nothing to learn")

    def weigh(
        self, scores: Scores, weights: Mapping[str, float], groups: torch.Tensor, features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight 1 for every sample, scored or not."""
        return torch.ones_like(scores.total), torch.ones_like(scores.total, dtype=torch.bool)

    def policy_step(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss (B,) of one noise level each."""
        view, cond = batch.view, batch.cond
        assert isinstance(view, Noised)
        reference = reference_output(self, policy, view, cond)
        v = paths.velocity_from(policy.path, policy.prediction, reference, view.latents, view.sigma)
        values, change = self.guidance(policy, view, v, cond)
        target = prediction_from(policy.path, policy.prediction, v + change, view.latents, view.sigma)
        output = predict(policy, view, cond)
        counts = (view.sigma < SINGULAR).to(output)
        loss = counts * errors(output, target)
        gap = errors(output.detach(), reference)
        size = norms(change) / norms(v).clamp_min(1e-12)
        return loss, {"error": loss.detach(), "velocity_gap": gap, "guide": values, "guide_size": size}

    def guidance(
        self, policy: Policy, view: Noised, v: torch.Tensor, cond: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) R of a view, and what it adds to the velocity v (B, ...), (B, ...).

        Raises:
            AlignkitError: a gradient is not finite; names the noise level and the prompt.
        """
        values, gradient = reward_gradient(lambda x, own: self.guide_reward(x, view.sigma, own), view.latents, cond)
        broken = (~gradient.flatten(1).isfinite().all(dim=1)).nonzero()
        if len(broken):
            row = int(broken[0])
            prompt = cond.prompts[row]
            raise AlignkitError(
                f"the gradient of the guide is not finite at noise level {float(view.sigma[row]):.3f}, prompt "
                f"{prompt.id} {str(prompt)!r}; usual causes: float16, a square root or a logarithm at 0 in the reward"
            )
        change = self.guide_weight * velocity_change(policy.path, gradient, view.sigma, SINGULAR)
        if self.guide_clip is not None:
            change = clipped(change, v, self.guide_clip)
        if view.dropped is not None:
            change = change * expand_to((~view.dropped).float(), change)
        return values, change


def prediction_from(
    path: Path, prediction: Prediction, v: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """(B, ...) what a denoiser of this parametrisation returns at x (B, ...) if its velocity is v (B, ...): the inverse
    of `flow.path.velocity_from`."""
    if prediction == "velocity":
        return v
    x0, eps = paths.x0_from_velocity(path, v, x, sigma), paths.eps_from_velocity(path, v, x, sigma)
    return paths.prediction_target(path, prediction, x0, eps, sigma)
