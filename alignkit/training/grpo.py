"""Flow-GRPO: policy gradient on the stochastic steps of a sampler (2505.05470), DDPO with another path (2305.13301).

1. Draw P prompts and one plan: which steps are stochastic. The plan is shared by every group.
2. Sample G images per prompt with the current weights; at stochastic steps keep latents, next latents, log-probs.
3. Score the images; a group's advantage is (r - mean) / std. Groups in which all rewards agree carry no signal and are
   left out.
4. For every recorded step recompute the Gaussian with gradient, ratio = exp(log p - log p_old),
   loss = max(-A ratio, -A clip(ratio, 1 +- clip)) + kl_beta KL(p || p_reference).
5. Average over live samples and steps, clip the gradient, step; with `updates` > 1 for each share of the prompts.

Deviations from the paper's code, on purpose: the KL is the true one of the step (`gaussian`; the published
coefficients assume `no_dt`); latents and transitions stay in float32; flat groups are dropped, not divided by an
epsilon; the first step is guarded by an explicit sigma_max. `plan="window"` is Flow-GRPO-Fast, `sliding` MixGRPO,
`ratio_norm` GRPO-Guard, noise kind `ddim` on eps/v models DDPO.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from alignkit.errors import RecipeError
from alignkit.flow import plan as plans
from alignkit.flow.plan import Plan
from alignkit.flow.transition import KLForm, Noise, Reduce
from alignkit.objectives.advantages import group_advantages, per_reward_advantages, quasi_norm
from alignkit.objectives.pareto import non_dominated
from alignkit.objectives.policy_gradient import clip_fractions, clipped_loss, clipped_objective, ratio_norm
from alignkit.objectives.shaping import diversity_shaping
from alignkit.policy import Conditioning, Policy
from alignkit.training.recipe import Recipe
from alignkit.training.seeds import generator
from alignkit.types import Scores, StepRecord


@dataclass(frozen=True)
class GRPO(Recipe):
    """A Flow-GRPO run.

    Attributes:
        noise: of the stochastic steps; `flow_sde`, `dance_sde`, `cps` for flows, `ddim` for eps and v models.
        plan: "full" (all steps but the last), "window" (contiguous, random start), "random" (a random subset),
            "sliding" (moves every `slide_every` rounds), or "explicit" (`plan_steps`).
        window: stochastic steps of a window, subset or slide.
        window_first, window_last: the window stays within these steps, both included; None: the last that can be
            trained.
        clip: half-width of the ratio's range. With reduce="mean" usual values are 1e-5 to 1e-3.
        kl_beta, kl_form: coefficient of the KL to the reference, and which of its three named forms.
        transform: of each trained reward before they are combined, the raw ones stay in the metrics. "log_sigmoid":
            log sigmoid((r - good) / scale), whose sum over rewards is a logical and: `good` is the quantile
            `transform_quantile` of the rewards of `transform_samples` samples of the untrained weights, measured when
            a prompt is first trained on. "quantile": the rank within the group, for rewards that cluster.
        transform_scales: {reward: difference that counts as one logit}; a reward that is not in it has the base's
            standard deviation within a prompt, of the first round.
        advantage: "group", "batch" or "none" (what the centred reward is divided by), "quasi" (the group's p-norm with
            p = 0.8), "per_reward" (each reward normalised in its group before the weighted sum), or "pareto" (1 for
            the samples of a group that no other beats on every reward, 0 for the rest; weights only give signs).
        advantage_clip: largest absolute advantage.
        diversity_shaping: multiplies positive advantages by the distance to the nearest sample of the group, by these
            features: "pixels", a trained reward with image features, or a spec of something with features; None: off.
        replay: groups with a signal that are kept and trained on again where a round has groups without one, in
            proportion to |advantage|; 0: none. For rewards that are rarely above zero; one process.
        replay_rounds: how many rounds old they may be; the ratio's clip has to bridge what changed since.
        ratio_norm: GRPO-Guard's centred ratio.
        reduce: of log-probabilities over positions.
    """

    noise: Noise = field(default_factory=lambda: Noise("flow_sde", 0.7))
    plan: Literal["full", "window", "random", "sliding", "explicit"] = "full"
    window: int = 2
    window_first: int = 0
    window_last: int | None = None
    slide_every: int = 25
    plan_steps: tuple[int, ...] = ()
    clip: float = 1e-4
    clip_high: float | None = None
    kl_beta: float = 0.0
    kl_form: KLForm = "gaussian"
    transform: Literal["none", "log_sigmoid", "quantile"] = "none"
    transform_quantile: float = 0.85
    transform_samples: int = 8
    transform_scales: Mapping[str, float] = field(default_factory=dict)
    advantage: Literal["group", "batch", "none", "quasi", "per_reward", "pareto"] = "group"
    advantage_clip: float | None = 5.0
    diversity_shaping: str | None = None
    replay: int = 0
    replay_rounds: int = 4
    ratio_norm: bool = False
    reduce: Reduce = "mean"

    def validate(self) -> None:
        super().validate()
        if self.group_size < 2:
            raise RecipeError(
                f"group_size={self.group_size}: a group of one has no mean to beat; use at least 2, usual 8"
            )
        if not 0 < self.clip < 1:
            raise RecipeError(f"clip={self.clip} must lie between 0 and 1; usual with reduce='mean': 1e-5 to 1e-3")
        if self.kl_beta < 0:
            raise RecipeError(f"kl_beta={self.kl_beta} must be at least 0")
        plans.require_stochastic(plan_of(self, 0))
        self._validate_advantages()

    def _validate_advantages(self) -> None:
        trained = [name for name, weight in self.rewards.items() if weight != 0]
        if self.advantage == "pareto" and len(trained) < 2:
            raise RecipeError(
                f"advantage='pareto' compares rewards and {len(trained)} has a weight; use 'group' or train on 2"
            )
        if not 0 < self.transform_quantile < 1:
            raise RecipeError(
                f"transform_quantile={self.transform_quantile} must lie between 0 and 1; the paper's: 0.85"
            )
        if self.transform_samples < 2:
            raise RecipeError(f"transform_samples={self.transform_samples} have no spread; at least 2, usual 8")
        for name, scale in self.transform_scales.items():
            if not scale > 0:
                raise RecipeError(f"transform_scales={{{name!r}: {scale}}}: a scale must be above 0")
        if self.replay < 0 or self.replay_rounds < 1:
            raise RecipeError(
                f"replay={self.replay}, replay_rounds={self.replay_rounds}: at least 0 groups (off) and 1 round"
            )

    def plan_for(self, step: int) -> Plan:
        """The plan of one round: the same on every process and after a resume."""
        return plan_of(self, step)


def plan_of(recipe: GRPO, step: int) -> Plan:
    """Which steps are stochastic in round `step`."""
    n, noise, rng = recipe.num_steps, recipe.noise, generator(recipe.seed, "plan", step)
    match recipe.plan:
        case "full":
            return plans.full(n, noise)
        case "window":
            return plans.window(n, recipe.window, rng, noise, recipe.window_first, recipe.window_last)
        case "random":
            return plans.random_subset(n, recipe.window, rng, noise, recipe.window_first, recipe.window_last)
        case "sliding":
            return plans.sliding(n, recipe.window, step, 1, recipe.slide_every, noise)
        case "explicit":
            return plans.explicit(n, recipe.plan_steps, noise)


def advantages(
    recipe: GRPO,
    scores: Scores,
    weights: Mapping[str, float],
    groups: torch.Tensor,
    features: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) advantages and the (B,) mask of samples that carry a signal; features (B, D) for `diversity_shaping`."""
    clip = recipe.advantage_clip
    match recipe.advantage:
        case "per_reward":
            found, live = per_reward_advantages(scores.parts, weights, groups, clip=clip)
        case "pareto":
            found, live = group_advantages(in_pareto_set(scores, weights, groups), groups, clip=clip)
        case "quasi":
            centred, live = group_advantages(scores.total, groups, scale="none")
            found = quasi_norm(centred, groups)
        case "group" | "batch" | "none":
            found, live = group_advantages(scores.total, groups, scale=recipe.advantage, clip=clip)
    if features is not None:
        found = diversity_shaping(found, features, groups)
    return found, live


def in_pareto_set(scores: Scores, weights: Mapping[str, float], groups: torch.Tensor) -> torch.Tensor:
    """(B,) 1 where no sample of the group is better on all rewards, else 0; NaN where the total is.

    Parrot (2401.05675) multiplies the raw reward of the samples in the set and sums over reward tokens; here being in
    it is the reward, relative to the group: no sample is reinforced only because rewards are positive, and no scale
    matters. A weight below 0 turns its reward around.
    """
    trained = [name for name, weight in weights.items() if weight != 0]
    signed = [scores.parts[name] * math.copysign(1.0, weights[name]) for name in trained]
    # A part that is NaN while the total is not does not apply, and then decides nothing.
    known = [torch.where(part.isnan() & ~scores.total.isnan(), 0.0, part) for part in signed]
    kept = non_dominated(torch.stack(known, dim=1), groups).to(scores.total)
    return kept.masked_fill(scores.total.isnan(), math.nan)


def policy_step(
    policy: Policy, cond: Conditioning, record: StepRecord, advantage: torch.Tensor, recipe: GRPO
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss (B,) of one recorded step, and (B,) numbers for the log."""
    now = policy.transition(record.latents, record.index, cond, recipe.noise, record.mask)
    log_prob = now.log_prob(record.next_latents, reduce=recipe.reduce)
    if recipe.ratio_norm:
        ratio = ratio_norm(log_prob, record.log_prob, now.mean, record.mean, now.std, mask=record.mask)
        loss = clipped_loss(ratio, advantage, recipe.clip, recipe.clip_high)
    else:
        loss, ratio = clipped_objective(log_prob, record.log_prob, advantage, recipe.clip, recipe.clip_high)
    low, high = clip_fractions(ratio.detach(), recipe.clip, recipe.clip_high)
    logs = {"ratio": ratio.detach(), "clip_low": low, "clip_high": high}
    if recipe.kl_beta > 0:
        with policy.reference(), torch.no_grad():
            reference = policy.transition(record.latents, record.index, cond, recipe.noise, record.mask)
        kl = now.kl(reference, recipe.reduce, recipe.kl_form)
        loss, logs["kl"] = loss + recipe.kl_beta * kl, kl.detach()
    return loss, logs
