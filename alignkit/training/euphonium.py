"""Euphonium (2602.04928): Flow-GRPO whose rollouts are guided by a process reward, and keep what the guidance found.

1. Sample as Flow-GRPO does, but at every step the velocity is `v + change`, `change = -guide_weight sigma / (1 - sigma)
   grad_x R(x, sigma, c)`, R the weighted sum of the noise-aware rewards in `guide`: groups explore where R rises. The
   change is recorded with the step.
2. Advantages as in Flow-GRPO, plus `process_weight` times the change of R over the step, standardised in the group: a
   step is praised for what came of its sample, and for what it did itself.
3. The recorded step is scored under the Gaussian of `v_theta + change`, so that before the first update the ratio is
   exactly 1: what is learnt is the difference between samples, not the guidance. A KL or velocity anchor compares with
   the reference under the same change.
4. `distil_beta |v_theta - (v_old + change)|^2`, a mean over positions, moves the guidance into the weights, which
   sample without a guide afterwards.

Assessments are never guided. With guide_weight=0, process_weight=0 this is Flow-GRPO, bit for bit.

The distillation has no fixed point while R has a slope: every round moves on by the change that is still added, so it
is a rate and not a temperature, and only an anchor (`kl_beta`, `velocity_beta`), the number of rounds or a rising KL
ends it: on the sign generator 8 rounds spell, 20 fall apart. `ValueGradient` is the one that stops at a tilt.

Deviations from the paper, on purpose: the change has the factor of noisy reward guidance, which is that of the density
`p exp(w R)` (VideoAlign, 2501.13918), where the paper adds `alpha grad R` at every level; R reads the features of the
untrained weights, so that it does not move; the singular first step is not guided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from alignkit.errors import RecipeError
from alignkit.flow.guidance import Strength
from alignkit.flow.plan import Plan
from alignkit.flow.transition import Transition, reduce_positions
from alignkit.inference.steering import noisy_reward_steering
from alignkit.objectives.advantages import group_advantages
from alignkit.training.grpo import GRPO
from alignkit.training.steered import Steered
from alignkit.types import Rollouts, StepRecord

if TYPE_CHECKING:
    from alignkit.policy import Conditioning, Policy
    from alignkit.rewards import Weighted
    from alignkit.training.experience import Experience
    from alignkit.training.update import Batch


@dataclass(frozen=True)
class Euphonium(Steered, GRPO):
    """A Flow-GRPO run with guided rollouts.

    Attributes:
        guide_weight: 0: rollouts are not guided.
        guide_start, guide_stop: shares of the steps between which there is guidance.
        process_weight: of the guide's own change over a step, standardised in the group, beside the outcome's
            advantage; 0: outcome alone.
        distil_beta: coefficient of the mean squared distance to the guided velocity; 0: no distillation.
    """

    guide_start: float = 0.0
    guide_stop: float = 1.0
    process_weight: float = 0.0
    distil_beta: float = 0.0

    def validate(self) -> None:
        super().validate()
        self.strength()
        for name in ("process_weight", "distil_beta"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name}={getattr(self, name)} must be at least 0")
        if self.distil_beta and not self.guide_weight:
            raise RecipeError(
                f"distil_beta={self.distil_beta} with guide_weight=0: nothing is guided, so there is nothing to distil"
            )
        if self.shared_noise or self.branch_width or self.replay:
            raise RecipeError(
                "shared_noise, branch_width and replay keep steps without what guided them; leave them out, or use GRPO"
            )

    def strength(self) -> Strength:
        """How the guide changes a velocity."""
        return Strength(self.guide_weight, self.guide_start, self.guide_stop, clip=self.guide_clip)

    def rollout(
        self,
        policy: Policy,
        cond: Conditioning,
        plan: Plan,
        rng: list[torch.Generator],
        group_size: int,
        poll: Callable[[], None],
    ) -> Rollouts:
        if not self.guide_weight or group_size != self.group_size:  # the base is measured as it is
            return super().rollout(policy, cond, plan, rng, group_size, poll)
        steer = noisy_reward_steering(
            self.guide_reward, cond, policy.path, plan.num_steps, self.strength(), self.micro_batch
        )
        return policy.rollout(cond, plan, rng, reduce=self.reduce, poll=poll, steer=steer)

    def completed(self, experience: Experience, rewards: Weighted) -> Experience:
        experience = super().completed(experience, rewards)
        return replace(experience, process=process_rewards(self, experience)) if self.process_weight else experience

    def chosen(
        self, experience: Experience, weights: torch.Tensor, live: torch.Tensor
    ) -> tuple[Experience, torch.Tensor, torch.Tensor]:
        experience, weights, live = super().chosen(experience, weights, live)
        if experience.process is None:
            return experience, weights, live
        by_step = [
            group_advantages(change, experience.groups, clip=self.advantage_clip)
            for change in experience.process.unbind(dim=1)
        ]
        process = torch.stack([found for found, _ in by_step], dim=1).to(weights)
        moved = torch.stack([own for _, own in by_step], dim=1).any(dim=1).to(live.device)
        scored = ~experience.scores.total.isnan().to(live.device)
        return experience, weights[:, None] + self.process_weight * process, live | (moved & scored)

    def anchored(
        self, policy: Policy, batch: Batch, record: StepRecord, now: Transition
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, logs = super().anchored(policy, batch, record, now)
        if not self.distil_beta or record.shift is None:
            return loss, logs
        assert now.velocity is not None
        apart = now.velocity - record.shift - sampled_velocity(self, policy, batch.cond, record)
        gap = reduce_positions(apart**2, record.mask, "mean")
        return loss + self.distil_beta * gap, logs | {"guide_gap": gap.detach()}


def sampled_velocity(recipe: GRPO, policy: Policy, cond: Conditioning, record: StepRecord) -> torch.Tensor:
    """(B, ...) the velocity that the step was sampled with, guidance included: its mean is linear in it."""
    s, index = cond.sigmas, record.index
    step = recipe.noise.coefficients(policy.path, float(s[index]), float(s[index + 1]), float(s[1]))
    return (record.mean - float(step.latents) * record.latents) / float(step.velocity)


@torch.no_grad()
def process_rewards(recipe: Euphonium, experience: Experience) -> torch.Tensor:
    """(B, V) how much the guide's R changes over each recorded step: R(next latents) - R(latents)."""
    size = recipe.rollout_batch or len(experience.groups)

    def asked(x: torch.Tensor, sigma: float) -> torch.Tensor:
        rows = [list(range(len(x)))[start : start + size] for start in range(0, len(x), size)]
        return torch.cat([recipe.guide_reward(x[own], sigma, experience.cond[own]) for own in rows])

    changes: list[torch.Tensor] = []
    last: tuple[int, torch.Tensor] | None = None
    for record in experience.rollouts.steps:
        known = last is not None and last[0] == record.index  # the step before ended where this one begins
        before = last[1] if known and last is not None else asked(record.latents, record.sigma)
        after = asked(record.next_latents, record.sigma_next)
        changes.append(after - before)
        last = record.index + 1, after
    return torch.stack(changes, dim=1)
