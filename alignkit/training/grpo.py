"""Flow-GRPO: policy gradient on the stochastic steps of a sampler (2505.05470), DDPO with another path (2305.13301).

1. Draw P prompts and one plan: which steps are stochastic. The plan is shared by every group.
2. Sample G images per prompt with the current weights; at stochastic steps keep latents, next latents, log-probs.
3. Score the images; a group's advantage is (r - mean) / std. Groups in which all rewards agree carry no signal and are
   left out.
4. For every recorded step recompute the Gaussian with gradient, ratio = exp(log p - log p_old),
   loss = w_step max(-A ratio, -A clip(ratio, 1 +- clip)) + kl_beta KL(p || p_reference).
5. Average over live samples and steps, clip the gradient, step; with `updates` > 1 for each share of the prompts.

It trains the guided output, as the sampler gives it; `train_guidance="off"` samples and trains without guidance.

The family, as fields:

    Flow-GRPO-Fast (2505.05470)     plan="window", window=2, window_last=num_steps // 2 - 1, noise cps
    MixGRPO (2507.21802)            plan="sliding", window=4; slide="decay" or "exp_decay"; random: plan="window"
    DanceGRPO (2505.07818)          noise dance_sde 0.3, shared_noise=True, plan="random"
    CPS (2509.05952)                noise cps 0.8; scaled=False for its published score -(x - mean)^2
    GRPO-Guard (2510.22319)         ratio_norm=True, step_weights="guard"
    TempFlow-GRPO (2508.04324)      shared_noise=True, plan="window", window=1, step_weights="tempflow"
    Flash-GRPO (2605.15980)         plan="window", window=1, step_weights="flash"
    Flow-DPPO (2606.11025)          objective="dppo"
    BranchGRPO (2509.06040)         branch_width=2, branches=(0, 3, 6, 9), group_size=16, plan="full"
    TreeGRPO (2512.08153)           branch_width=3, plan="window", window=3, window_decay=0.5, group_size=27
    GARDO (2512.24138)              kl_share=0.1 with rewards of weight 0 beside, reference="old", old=Follow(kl=...)
    DiverseGRPO                     kl_steps=K
    ADRPO                           kl_adaptive=1.0
    DDPO (2305.13301)               noise ddim 1.0 on eps and v models

Deviations from the papers' code, on purpose: the KL is the true one of the step (`gaussian`; the published
coefficients assume `no_dt`); latents and transitions stay in float32; flat groups are dropped, not divided by an
epsilon; the first step is guarded by an explicit sigma_max; step weights have mean 1 over all steps that the plan can
draw, so a window does not change the learning rate; GRPO-Guard divides by |d mean / d v|, which is dt for Flow-SDE, and
so holds for any sampler; ADRPO's coefficient stops at 0; DiverseGRPO's KL has the named forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch

from alignkit.flow import plan as plans
from alignkit.flow.path import Path
from alignkit.flow.plan import Plan, Slide
from alignkit.flow.transition import KLForm, Noise, Reduce, Transition
from alignkit.objectives import policy_gradient
from alignkit.objectives.policy_gradient import clip_fractions, clipped_loss, masked_objective, mean_divergence
from alignkit.policy import Conditioning, Policy
from alignkit.training import anchors, grpo_rules, tree
from alignkit.training.experience import Experience
from alignkit.training.seeds import generator
from alignkit.training.shaped import Shaped
from alignkit.training.update import Batch
from alignkit.types import Rollouts, StepRecord

if TYPE_CHECKING:
    from alignkit.rewards import Weighted


@dataclass(frozen=True)
class GRPO(Shaped):
    """A Flow-GRPO run.

    Attributes:
        noise: of the stochastic steps; `flow_sde`, `dance_sde`, `cps` for flows, `ddim` for eps and v models.
        plan: "full" (all steps but the last), "window" (contiguous, random start), "random" (a random subset),
            "sliding" (moves every `slide_every` rounds), or "explicit" (`plan_steps`).
        window: stochastic steps of a window, subset or slide.
        window_first, window_last: the window stays within these steps, both included; None: the last that can be
            trained.
        window_decay: of "window": the i-th place has probability proportional to this to the i; None: all alike.
        slide: of "sliding": how long the window stays at later steps; "constant", "decay" or "exp_decay", see
            `flow.plan.iterations_at`.
        objective: "clip", or "dppo", which has no clip: a sample drops out where its step has gone further than
            `dppo_threshold` (KL per position) and would go on.
        clip, clip_high: half-width of the ratio's range, upper one if it differs. With reduce="mean" usual values are
            1e-5 to 1e-3.
        step_weights: what each step counts: "none", "tempflow" (by its noise), "flash" (evens out the gradients of the
            log-probability), "guard" (the same for `ratio_norm`).
        ratio_norm: GRPO-Guard's centred ratio.
        shared_noise: samples of a group start from one noise and part at the first stochastic step.
        branch_width: samples of a group are the leaves of a tree that parts into so many branches at every split, and
            each step is judged by its branch; `branch_width ** splits` is `group_size`. 0: no tree.
        branches: steps where the tree splits; (): every stochastic step.
        kl_beta, kl_form: coefficient of the KL to the reference, and which of its three named forms.
        kl_steps: only the first so many steps of the grid get the KL; None: all.
        kl_share: the KL and the velocity anchor hold only this share of the samples, those of which the trained
            reward is most likely wrong by the rewards of weight 0; 1: all.
        kl_adaptive: the KL's coefficient is `max(kl_beta - kl_adaptive A, 0)`: bad samples are held more.
        velocity_beta: coefficient of the mean squared distance to the reference's velocity.
        replay: groups with a signal that are kept and trained on again where a round has groups without one, in
            proportion to |advantage|; 0: none. For rewards that are rarely above zero; one process.
        replay_rounds: how many rounds old they may be; the ratio's clip has to bridge what changed since.
        reduce: of log-probabilities over positions.
    """

    noise: Noise = field(default_factory=lambda: Noise("flow_sde", 0.7))
    plan: Literal["full", "window", "random", "sliding", "explicit"] = "full"
    window: int = 2
    window_first: int = 0
    window_last: int | None = None
    window_decay: float | None = None
    slide: Slide = "constant"
    slide_every: int = 25
    plan_steps: tuple[int, ...] = ()
    objective: Literal["clip", "dppo"] = "clip"
    clip: float = 1e-4
    clip_high: float | None = None
    dppo_threshold: float = 1e-5
    step_weights: Literal["none", "tempflow", "flash", "guard"] = "none"
    ratio_norm: bool = False
    shared_noise: bool = False
    branch_width: int = 0
    branches: tuple[int, ...] = ()
    kl_beta: float = 0.0
    kl_form: KLForm = "gaussian"
    kl_steps: int | None = None
    kl_share: float = 1.0
    kl_adaptive: float = 0.0
    velocity_beta: float = 0.0
    replay: int = 0
    replay_rounds: int = 4
    reduce: Reduce = "mean"

    def validate(self) -> None:
        super().validate()
        grpo_rules.check(self, plan_of(self, 0), drawable(self))

    @property
    def measures_kl(self) -> bool:
        return self.kl_beta > 0

    def plan_for(self, step: int) -> Plan:
        return plan_of(self, step)

    def splits_for(self, plan: Plan) -> tuple[int, ...]:
        """Steps of a round's plan at which the samples of a group part; () where they share nothing."""
        if self.branch_width:
            return plans.splits_of(plan, self.branches)
        return (min(plan.stochastic),) if self.shared_noise else ()

    def rollout(
        self,
        policy: Policy,
        cond: Conditioning,
        plan: Plan,
        rng: list[torch.Generator],
        group_size: int,
        poll: Callable[[], None],
    ) -> Rollouts:
        splits = self.splits_for(plan)
        if not splits or group_size != self.group_size:  # the base is measured on independent samples
            return policy.rollout(cond, plan, rng, reduce=self.reduce, poll=poll)
        shape = {"splits": splits, "width": self.branch_width or group_size, "group_size": group_size}
        return tree.rollout(policy, cond, plan, rng, **shape, reduce=self.reduce, poll=poll)

    def completed(self, experience: Experience, rewards: Weighted) -> Experience:
        experience = super().completed(experience, rewards)
        if self.kl_share == 1.0:
            return experience
        return replace(experience, gate=anchors.gate_of(experience.scores, rewards.weights, self.kl_share))

    def chosen(
        self, experience: Experience, weights: torch.Tensor, live: torch.Tensor
    ) -> tuple[Experience, torch.Tensor, torch.Tensor]:
        if not self.branch_width:
            return experience, weights, live
        steps = experience.rollouts.steps
        splits = tuple(sorted(self.branches)) or tuple(record.index for record in steps)
        scale = self.advantage if self.advantage in ("group", "batch", "none") else "group"
        shape = {"splits": splits, "width": self.branch_width, "scale": scale, "clip": self.advantage_clip}
        return experience, tree.branch_advantages(weights, live, experience.groups, steps, **shape), live

    def policy_step(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        record = batch.view
        assert isinstance(record, StepRecord)
        now = policy.transition(record.latents, record.index, batch.cond, self.noise, record.mask, record.shift)
        loss, logs = surrogate(self, now, record, batch.weights)
        loss = loss * step_weight(self, policy.path, batch.cond.sigmas, record.index)
        away, measured = self.anchored(policy, batch, record, now)
        return loss + away, logs | measured

    def anchored(
        self, policy: Policy, batch: Batch, record: StepRecord, now: Transition
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What a step costs (B,) beside the policy gradient, and (B,) numbers for the log."""
        return anchored(self, policy, batch, record, now)


def surrogate(
    recipe: GRPO, now: Transition, record: StepRecord, advantages: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Policy-gradient loss (B,) of one recorded step, and (B,) or () numbers for the log."""
    log_prob = now.log_prob(record.next_latents, reduce=recipe.reduce)
    moved = (now.mean, record.mean, now.std, record.mask)
    if recipe.ratio_norm:
        ratio = policy_gradient.ratio_norm(log_prob, record.log_prob, *moved)
    else:
        ratio = (log_prob - record.log_prob).exp()
    logs = {"ratio": ratio.detach()}
    if recipe.objective == "dppo":
        divergence = mean_divergence(*moved).detach()
        loss, kept = masked_objective(ratio, advantages, divergence, recipe.dppo_threshold)
        return loss, logs | {"divergence": divergence, "dropped": (~kept).to(ratio.detach())}
    low, high = clip_fractions(ratio.detach(), recipe.clip, recipe.clip_high)
    loss = clipped_loss(ratio, advantages, recipe.clip, recipe.clip_high)
    return loss, logs | {"clip_low": low, "clip_high": high}


def anchored(
    recipe: GRPO, policy: Policy, batch: Batch, record: StepRecord, now: Transition
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(B,) what being away from the reference costs at this step, and what was measured."""
    held = recipe.kl_beta > 0 and anchors.kl_counts(record.index, recipe.kl_steps)
    if not held and recipe.velocity_beta == 0:
        return torch.zeros(len(now.mean), device=now.mean.device), {}
    with recipe.compared(policy), torch.no_grad():
        step = (record.latents, record.index, batch.cond, recipe.noise, record.mask, record.shift)
        reference = policy.transition(*step)
    beta: float | torch.Tensor = recipe.kl_beta if held else 0.0
    if held and recipe.kl_adaptive:
        beta = anchors.adaptive_beta(recipe.kl_beta, batch.weights, recipe.kl_adaptive)
    return anchors.distance(
        now,
        reference,
        kl_beta=beta,
        kl_form=recipe.kl_form,
        velocity_beta=recipe.velocity_beta,
        reduce=recipe.reduce,
        gate=batch.gate,
    )


def drawable(recipe: GRPO) -> tuple[int, ...]:
    """Every step that some round's plan can make stochastic, ascending."""
    if recipe.plan == "explicit":
        return tuple(sorted(set(recipe.plan_steps)))
    if recipe.plan in ("window", "random"):
        last = recipe.num_steps - 2 if recipe.window_last is None else recipe.window_last
        return tuple(range(recipe.window_first, last + 1))
    return tuple(range(recipe.num_steps - 1))


def step_weight(recipe: GRPO, path: Path, sigmas: torch.Tensor, index: int) -> float:
    """What step `index` counts on the grid `sigmas` (num_steps + 1,); 1 on average over all drawable steps."""
    if recipe.step_weights == "none":
        return 1.0
    steps, grid = torch.tensor(drawable(recipe)), sigmas.double().cpu()
    coefficients = recipe.noise.coefficients(path, grid[steps], grid[steps + 1], grid[1])
    weights = policy_gradient.step_weights(recipe.step_weights, coefficients)
    return float(weights[steps == index])


def plan_of(recipe: GRPO, step: int) -> Plan:
    """Which steps are stochastic in round `step`."""
    n, noise, rng = recipe.num_steps, recipe.noise, generator(recipe.seed, "plan", step)
    first, last = recipe.window_first, recipe.window_last
    match recipe.plan:
        case "full":
            return plans.full(n, noise)
        case "window":
            return plans.window(n, recipe.window, rng, noise, first, last, recipe.window_decay)
        case "random":
            return plans.random_subset(n, recipe.window, rng, noise, first, last)
        case "sliding":
            return plans.sliding(n, recipe.window, step, 1, recipe.slide_every, noise, recipe.slide)
        case "explicit":
            return plans.explicit(n, recipe.plan_steps, noise)
