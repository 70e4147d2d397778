"""The fields that every training recipe has, and the questions that a round asks it.

A method is a subclass: a config, and the hooks `weigh`, `chosen`, `views` and `policy_step` where it differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from alignkit.errors import RecipeError
from alignkit.flow import plan as plans
from alignkit.flow.plan import Plan
from alignkit.policy.adapters import Full, LoRA
from alignkit.policy.memory import Decode
from alignkit.training.adversary import Critic
from alignkit.training.follow import Follow
from alignkit.types import Rollouts, Scores, View

if TYPE_CHECKING:
    from alignkit.policy import Conditioning, Policy
    from alignkit.rewards import Weighted
    from alignkit.training.experience import Experience
    from alignkit.training.offline import OfflineData
    from alignkit.training.update import Batch

RewardSpec = str | Callable[..., Any]


@dataclass(frozen=True)
class Recipe:
    """What is trained, on which prompts, towards which rewards, and how a run is kept.

    Attributes:
        model: folder or hub id for `DiffusionPipeline.from_pretrained`; `shipped:assets/...` is what comes with
            alignkit.
        prompts: prompt file of the training prompts (`.txt`, `.jsonl`, `.csv`, parquet); None with `data`, which has
            its own.
        rewards: {name, `module:Name`, `file.py:name` or callable: weight}. With `data` they are only measured.
        call: the pipeline's own keywords (height, width, guidance_scale, ...).
        eval_prompts: prompt file of held-out prompts; None holds out a tenth of `prompts`.
        judges: rewards that are only measured, before and after, never trained on.
        guidance_baseline: keywords that switch the base model's guidance on, for the comparison in the report.
        train: LoRA(...) or Full().
        num_steps: denoising steps of a rollout.
        eval_steps: denoising steps of an evaluation; None: the same.
        steps: optimisation rounds.
        time_limit: seconds of training after which the run finishes early; None: no limit.
        prompts_per_step: P, prompts per round over all processes.
        group_size: G, samples per prompt.
        updates: optimizer steps per round.
        micro_batch: samples per backward; None: all of an update at once. It changes memory, not results.
        rollout_batch: samples per rollout call; None: all of the round at once.
        train_guidance: "same" trains the guided output, "off" samples and trains without guidance.
        precision: "fp32", "bf16" or "fp16" (mixed: adapters stay float32). fp32 means fp32.
        decode: how decoders trade time for memory, such as Decode(tiling=True) or Decode(batch=2).
        ema_decay: moving average of the weights that is evaluated and saved; None: none.
        critic: how the critics among the rewards are trained beside the policy (Adv-GRPO); None: none is.
        data: file of preference pairs or of scored samples to learn from, as `alignkit pairs` writes them; None: the
            method samples for itself (online).
        reference: what "away from the reference" means for a KL, a velocity anchor or a preference: "base", the
            weights before training, or "old", the companion that follows them as `old` says.
        old: when the companion `old` follows the trained weights; used by `reference="old"`, by
            `sample_with="old"` and by methods that learn from the difference to it.
        sample_with: which weights sample a round: "current", or "old".
        data_beta: coefficient of the denoising loss on data, the anchor of DDRL (2512.04332); 0: none.
        data_anchor: that data, a file as for `data`; None: `data_samples` samples of the untrained weights.
        data_samples: how many samples anchor and its alarm use; the alarm, at 10 % above the first loss, is on where
            `data_beta` is above 0 or `data_anchor` is given.
        kl_prompts: held-out prompts on which `eval_every` and the summary measure the KL to the base; 0: not measured.
        seed: of everything random in the run.
        warmup, lr_schedule: rounds of linear warm-up; "linear" then falls to 0 at the last of `steps`.
        on_error: what a failed reward does: "raise" stops the run, "mask" leaves the sample out.
        reward_timeout: seconds that one call of one reward may take, then it failed; None: no limit.
        rewards_beside: score one rollout batch in a thread while the next is sampled; needs `rollout_batch`. The
            numbers are the same. It helps with rewards that wait for a server, run on another device, or leave a
            processor free. The next round never begins before the scores of this one have trained the weights.
        reward_device: where media are scored, such as "cuda:1"; None: where they were sampled.
        eval_every: rounds between small held-out evaluations (curves); 0: none.
        eval_limit: held-out prompts of the evaluations before and after; None: all.
        checkpoint_seconds: longest time between commits when rounds are short.
        tracker: "tensorboard" or "wandb" beside the run's own files.
    """

    whole_groups: ClassVar[bool] = False
    """Its loss compares the samples of a group: a backward holds whole groups."""
    learns_from: ClassVar[Literal["rollouts", "samples", "pairs"]] = "rollouts"
    """What `data` may hold; "rollouts": it cannot learn from data."""
    needs_old: ClassVar[bool] = False
    """It learns from the difference to the companion `old`."""

    model: str
    prompts: str | None
    rewards: Mapping[Any, float]
    call: Mapping[str, Any] = field(default_factory=dict)
    eval_prompts: str | None = None
    judges: tuple[RewardSpec, ...] = ()
    guidance_baseline: Mapping[str, Any] = field(default_factory=dict)
    train: LoRA | Full = field(default_factory=LoRA)
    init_lora: str | None = None
    num_steps: int = 10
    eval_steps: int | None = None
    steps: int = 100
    time_limit: float | None = None
    prompts_per_step: int = 8
    group_size: int = 8
    updates: int = 1
    micro_batch: int | None = None
    rollout_batch: int | None = None
    train_guidance: Literal["same", "off"] = "same"
    lr: float = 3e-4
    warmup: int = 0
    lr_schedule: Literal["constant", "linear"] = "constant"
    weight_decay: float = 1e-4
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    attention: str = "auto"
    decode: Decode = field(default_factory=Decode)
    ema_decay: float | None = None
    critic: Critic | None = None
    data: str | None = None
    reference: Literal["base", "old"] = "base"
    old: Follow = field(default_factory=Follow)
    sample_with: Literal["current", "old"] = "current"
    data_beta: float = 0.0
    data_anchor: str | None = None
    data_samples: int = 64
    kl_prompts: int = 8
    seed: int = 0
    on_error: Literal["raise", "mask"] = "raise"
    reward_timeout: float | None = None
    rewards_beside: bool = False
    reward_device: str | None = None
    eval_every: int = 10
    eval_curve_prompts: int = 32
    eval_limit: int | None = None
    eval_batch: int = 64
    sample_prompts: int = 12
    diversity_prompts: int = 8
    diversity_samples: int = 8
    checkpoint_seconds: float = 15.0
    keep_checkpoints: int = 2
    tracker: Literal["none", "tensorboard", "wandb"] = "none"

    # what a round asks

    @property
    def uses_old(self) -> bool:
        """Whether the companion `old` is kept."""
        return self.needs_old or "old" in (self.reference, self.sample_with)

    @property
    def keeps_media(self) -> bool:
        """Whether an experience keeps its media after they were scored, for `completed` or a critic."""
        return self.critic is not None

    @property
    def measures_kl(self) -> bool:
        """Whether the loss has a KL to the reference in it, which the log then has as `policy/kl`."""
        return False

    def plan_for(self, step: int) -> Plan:
        """Which steps of the sampler are stochastic in round `step`: the same on every process, after a resume too."""
        return plans.deterministic(self.num_steps)

    def rollout(
        self,
        policy: Policy,
        cond: Conditioning,
        plan: Plan,
        rng: list[torch.Generator],
        group_size: int,
        poll: Callable[[], None],
    ) -> Rollouts:
        """Sample whole groups of `group_size`, one generator per sample."""
        return policy.rollout(cond, plan, rng, poll=poll)

    def weigh(
        self, scores: Scores, weights: Mapping[str, float], groups: torch.Tensor, features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) what each sample weighs, and the (B,) bool mask of samples that carry a signal.

        Args:
            weights: of the rewards, by name.
            groups: (B,) int64.
            features: (B, D) where the recipe compares samples by features.
        """
        raise NotImplementedError(f"{type(self).__name__} must define weigh()")

    def bound(self, policy: Policy) -> Recipe:
        """The recipe with what it needs of the policy, asked once before the first round."""
        return self

    def completed(self, experience: Experience, rewards: Weighted) -> Experience:
        """The experience with what the method needs beside samples and scores, such as region maps."""
        return experience

    def check_data(self, data: OfflineData) -> None:
        """Refuse data from which the method cannot learn.

        Raises:
            RecipeError: such data.
        """

    def measured(self, weights: torch.Tensor, live: torch.Tensor) -> dict[str, float]:
        """Numbers for the log that say what the weights (B,) of a round do."""
        return {}

    def chosen(
        self, experience: Experience, weights: torch.Tensor, live: torch.Tensor
    ) -> tuple[Experience, torch.Tensor, torch.Tensor]:
        """What of an experience is trained on, with its weights and mask; methods of pairs make them here."""
        return experience, weights, live

    def views(self, policy: Policy, experience: Experience, rng: Sequence[torch.Generator]) -> tuple[View, ...]:
        """What a sample is trained on, one after the other; `rng` has one generator per sample."""
        return experience.rollouts.steps

    def policy_step(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss (B,) of one view, and (B,) or () numbers for the log."""
        raise NotImplementedError(f"{type(self).__name__} must define policy_step()")

    def compared(self, policy: Policy) -> AbstractContextManager[None]:
        """Context: the weights that the reference means."""
        return policy.old() if self.reference == "old" else policy.reference()

    def lr_at(self, step: int) -> float:
        """The learning rate of round `step`."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        return self.lr * warm * (1 - step / self.steps if self.lr_schedule == "linear" else 1.0)

    def validate(self) -> None:
        """Refuse what cannot work, saying what was given, the rule, and a value that would work.

        Raises:
            RecipeError: an impossible combination.
        """
        positive = ("num_steps", "prompts_per_step", "group_size", "updates", "eval_batch")
        for name in positive:
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)} must be at least 1")
        if self.steps < 0:
            raise RecipeError(f"steps={self.steps} must be at least 0")
        if not self.rewards:
            raise RecipeError("rewards is empty; give at least one, for example {'ocr': 1.0}")
        if self.lr <= 0:
            raise RecipeError(f"lr={self.lr} must be above 0; usual for LoRA: 1e-4 to 1e-3")
        if self.prompts_per_step % self.updates:
            divisors = [n for n in range(1, self.prompts_per_step + 1) if self.prompts_per_step % n == 0]
            near = min(divisors, key=lambda n: abs(n - self.updates))
            raise RecipeError(
                f"updates={self.updates} does not split prompts_per_step={self.prompts_per_step} into whole groups; "
                f"nearest: updates={near}"
            )
        self._validate_old()
        self._validate_data()
        if self.whole_groups and self.micro_batch is not None and self.micro_batch % self.group_size:
            raise RecipeError(
                f"micro_batch={self.micro_batch} splits groups of group_size={self.group_size}, which this loss "
                f"compares; use a multiple, such as {max(self.micro_batch // self.group_size, 1) * self.group_size}"
            )
        samples = self.prompts_per_step * self.group_size
        if self.rewards_beside and (self.rollout_batch is None or self.rollout_batch >= samples):
            raise RecipeError(
                f"rewards_beside=True with rollout_batch={self.rollout_batch}: all {samples} samples of a round come "
                f"at once, so there is nothing to score beside; use one below, such as {max(samples // 4, 1)}"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise RecipeError(f"ema_decay={self.ema_decay} must lie between 0 and 1, or be None")

    def _validate_old(self) -> None:
        self.old.validate()
        (default,) = (f.default_factory for f in fields(self) if f.name == "old")
        assert default is not MISSING
        if self.old != default() and not self.uses_old:
            raise RecipeError(
                f"old={self.old} is used by nothing here; with reference='old' it is what is compared with, with "
                "sample_with='old' what samples"
            )

        if self.old.kl is not None and (self.reference != "old" or not self.measures_kl):
            raise RecipeError(
                f"old.kl={self.old.kl} waits for a KL to the old weights that no round measures; it needs GRPO with "
                "kl_beta above 0 and reference='old'"
            )

    def _validate_data(self) -> None:
        if (self.prompts is None) == (self.data is None):
            given = "neither" if self.data is None else "both"
            raise RecipeError(
                f"{given} of prompts and data were given; a run samples for `prompts` or learns from `data`, whose "
                "prompts come with it"
            )
        if self.data is not None and self.learns_from == "rollouts":
            raise RecipeError(
                f"data={self.data!r}: {type(self).__name__} learns from the steps of its own rollouts, which no file "
                "has; leave it out, or use DPO, RWR or SFT"
            )
        if self.data is not None and self.critic is not None:
            raise RecipeError("critic with data: a critic learns from what the policy draws now; leave one of them out")
        if self.data is not None and self.sample_with == "old":
            raise RecipeError("sample_with='old' with data: nothing is sampled; leave one of them out")
        if self.data_beta < 0 or self.data_samples < 1:
            raise RecipeError(
                f"data_beta={self.data_beta} must be at least 0 and data_samples={self.data_samples} at least 1"
            )
