"""The fields that every training recipe has. A trainer's own config adds what its algorithm needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from alignkit.errors import RecipeError
from alignkit.policy.adapters import Full, LoRA

RewardSpec = str | Callable[..., Any]


@dataclass(frozen=True)
class Recipe:
    """What is trained, on which prompts, towards which rewards, and how a run is kept.

    Attributes:
        model: folder or hub id for `DiffusionPipeline.from_pretrained`; `shipped:assets/...` is what comes with
            alignkit.
        prompts: prompt file of the training prompts (`.txt`, `.jsonl`, `.csv`, parquet).
        rewards: {name, `module:Name`, `file.py:name` or callable: weight}.
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
        ema_decay: moving average of the weights that is evaluated and saved; None: none.
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

    model: str
    prompts: str
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
    ema_decay: float | None = None
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
        samples = self.prompts_per_step * self.group_size
        if self.rewards_beside and (self.rollout_batch is None or self.rollout_batch >= samples):
            raise RecipeError(
                f"rewards_beside=True with rollout_batch={self.rollout_batch}: all {samples} samples of a round come "
                f"at once, so there is nothing to score beside; use one below, such as {max(samples // 4, 1)}"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise RecipeError(f"ema_decay={self.ema_decay} must lie between 0 and 1, or be None")
