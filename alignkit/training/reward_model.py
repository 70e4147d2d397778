"""Training a reward model: one loop for every head, loss and noise level.

1. Batch of the step, drawn by a generator that belongs to the step (examples: `examples.py`, or the recipe's own).
2. With `noise`, take it to noise levels: x_sigma = (1 - sigma) x0 + sigma eps, the sides of a pair with the same
   sigma and eps.
3. Loss of the scorer on it (`reward_losses.py`, or the recipe's own), gradient, clipping, AdamW.
4. `after_step`, where the scorer has one (a teacher that follows its student), and the moving average of the weights.

The data measure the scorer before, on the way and after; the scorer writes itself to `<run>/model/`.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from rapidfuzz import process
from torch import nn

from alignkit.errors import AlignkitError, RecipeError
from alignkit.evaluation.report import write_report
from alignkit.training.examples import Movable, Noisable
from alignkit.training.loop import State
from alignkit.training.progress import Display
from alignkit.training.reward_losses import LOSSES, Loss
from alignkit.training.run_dir import RunDir
from alignkit.training.runtime import Runtime
from alignkit.training.seeds import generator
from alignkit.training.signals import StopFlag
from alignkit.training.specs import Spec, made, named


@runtime_checkable
class Scorer(Protocol):
    """What a recipe's `model` makes: an `nn.Module` that `save` writes to a folder in its published layout.

    The losses of the table call it as `scorer(media, prompts)` -> (B,) or (B, D), with `sigma` (B,) as a third
    argument where the recipe has `noise`. Parameters that do not require a gradient are not trained.
    """

    def save(self, folder: Path) -> None: ...


@runtime_checkable
class AfterStep(Protocol):
    """A scorer that changes after each optimizer step, such as a teacher that follows its student."""

    def after_step(self, step: int) -> None: ...


@runtime_checkable
class Examples(Protocol):
    """What a recipe's `data` makes."""

    def batch(self, size: int, rng: torch.Generator) -> Any:
        """`size` training examples, all randomness from `rng`."""
        ...

    def measure(self, scorer: Any) -> Mapping[str, float]:
        """What the scorer is judged by, on examples that `batch` never gives; higher is better. No gradients."""
        ...


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """What learns to score, from which examples, by which loss, and how the run is kept.

    Attributes:
        model: makes the scorer: a callable without arguments, `module:name`, `path/file.py:name` or
            `shipped:recipes/...file.py:name`, each also with options, `file.py:name(width=64)`. See `Scorer`.
        data: makes the examples, in the same way. See `Examples`.
        loss: a name of `reward_losses.LOSSES`, or a callable or spec: `(scorer, batch, rng) -> (scalar,
            {name: number})`.
        noise: (low, high) noise levels that examples are taken to, 0 <= low <= high < 1; None: clean examples.
        batch: examples per step over all processes.
        steps, time_limit: optimizer steps; seconds of training after which the run finishes early.
        lr, warmup, lr_schedule: AdamW's learning rate; steps of linear warm-up; "linear" and "cosine" then fall to 0
            at the last of `steps`.
        ema_decay: moving average of the weights that is measured and saved; None: none.
        eval_every: steps between measurements on the way; 0: none.
        precision, seed, checkpoint_seconds, keep_checkpoints, tracker: as in every recipe.
    """

    model: Spec
    data: Spec
    loss: Spec = "bradley_terry"
    noise: tuple[float, float] | None = None
    batch: int = 32
    steps: int = 1000
    time_limit: float | None = None
    lr: float = 1e-3
    warmup: int = 0
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 0.01
    adam_betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0
    eval_every: int = 100
    checkpoint_seconds: float = 30.0
    keep_checkpoints: int = 2
    tracker: Literal["none", "tensorboard", "wandb"] = "none"

    @property
    def specs(self) -> tuple[str, ...]:
        """The specs among the fields, whose files a run directory keeps."""
        return tuple(s for s in (self.model, self.data, self.loss) if isinstance(s, str) and s not in LOSSES)

    def lr_at(self, step: int) -> float:
        """The learning rate of step `step`."""
        warm, done = min(1.0, (step + 1) / max(self.warmup, 1)), step / max(self.steps, 1)
        fall = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return self.lr * warm * fall[self.lr_schedule]

    def validate(self) -> None:
        """Refuse what cannot work.

        Raises:
            RecipeError: a value, the rule it breaks, and one that would work.
        """
        if self.batch < 1 or self.steps < 0:
            raise RecipeError(f"batch={self.batch} must be at least 1 and steps={self.steps} at least 0")
        if self.lr <= 0:
            raise RecipeError(f"lr={self.lr} must be above 0; usual from scratch: 1e-3, for a pretrained model: 1e-5")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise RecipeError(f"ema_decay={self.ema_decay} must lie between 0 and 1, or be None")
        if self.noise is not None and not 0 <= self.noise[0] <= self.noise[1] < 1:
            raise RecipeError(
                f"noise={self.noise} must be (low, high) with 0 <= low <= high < 1: at 1 nothing of the picture is "
                "left to prefer; for example (0.0, 0.95)"
            )
        if isinstance(self.loss, str) and self.loss not in LOSSES and ":" not in self.loss:
            near = process.extractOne(self.loss, list(LOSSES))
            hint = f"; nearest: {near[0]!r}" if near else ""
            raise RecipeError(f"there is no loss {self.loss!r}{hint}; known: {', '.join(LOSSES)}, or give file.py:name")


class RewardTraining:
    """One such run in this process, as `loop.py` sees it."""

    def __init__(self, recipe: RewardModel, directory: RunDir, flag: StopFlag) -> None:
        self.recipe, self.directory, self.flag, self.state = recipe, directory, flag, State()
        self.runtime = Runtime(recipe.precision)
        self.display = Display(recipe.steps, enabled=self.runtime.main)
        if recipe.batch % self.runtime.world:
            raise RecipeError(f"batch={recipe.batch} does not split over {self.runtime.world} processes")
        torch.manual_seed(recipe.seed)  # the scorer's first weights and its dropout draw from the global generator
        self.scorer = self._scorer()
        self.data = made(recipe.data, "data")
        if not isinstance(self.data, Examples):
            raise RecipeError(f"data={recipe.data!r} made a {type(self.data).__name__} without batch() and measure()")
        known = LOSSES.get(recipe.loss) if isinstance(recipe.loss, str) else None
        self.loss: Loss = known or named(recipe.loss, "loss")
        self.parameters = [p for p in self.scorer.parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.parameters] if recipe.ema_decay is not None else []
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.lr, betas=recipe.adam_betas, weight_decay=recipe.weight_decay
        )
        self.open = ExitStack()
        self.open.callback(self.runtime.track(recipe.tracker, directory.folder))

    def _scorer(self) -> nn.Module:
        scorer = made(self.recipe.model, "model")
        if not (isinstance(scorer, nn.Module) and isinstance(scorer, Scorer)):
            raise RecipeError(
                f"model={self.recipe.model!r} made a {type(scorer).__name__}; expected an nn.Module with save(folder)"
            )
        if not any(p.requires_grad for p in scorer.parameters()):
            raise RecipeError(
                f"model={self.recipe.model!r} has no parameter that requires a gradient: nothing to train"
            )
        return scorer.to(self.runtime.device)

    # phases

    def before(self) -> dict[str, Any]:
        """The untrained scorer's measures."""
        began = time.monotonic()
        self.display.say("measuring the scorer before training")
        return {"measures": self.measure(), "seconds": time.monotonic() - began}

    def round(self, step: int) -> dict[str, float]:
        """One optimizer step."""
        recipe, runtime = self.recipe, self.runtime
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        rng = generator(recipe.seed, "batch", step, runtime.rank)
        batch = self._batch(rng)
        self.scorer.train()
        with runtime.autocast():
            loss, logs = self.loss(self.scorer, batch, rng)
        if not bool(loss.isfinite()):
            raise AlignkitError(
                f"the loss of step {step} is {float(loss.detach())}; the weights are those of the step before. Usual "
                "causes: a learning rate that is too high, examples that are not finite, or fp16"
            )
        runtime.backward(loss / runtime.world)
        norm = runtime.optimizer_step(self.optimizer, self.parameters, recipe.max_grad_norm)
        if isinstance(self.scorer, AfterStep):
            self.scorer.after_step(step)
        self._follow(step)
        if step == 0:
            runtime.check_equal(self.parameters)
        return {
            "train/loss": float(loss.detach()),
            **{f"train/{n}": v for n, v in logs.items()},
            "train/grad_norm": norm,
        }

    def _batch(self, rng: torch.Generator) -> Any:
        batch = self.data.batch(self.recipe.batch // self.runtime.world, rng)
        if self.recipe.noise is not None:
            if not isinstance(batch, Noisable):
                raise RecipeError(f"noise={self.recipe.noise} needs batches with noised(); got {type(batch).__name__}")
            batch = batch.noised(*self.recipe.noise, rng)
        return batch.to(self.runtime.device) if isinstance(batch, Movable) else batch

    @torch.no_grad()
    def _follow(self, step: int) -> None:
        """Move the average; early on it follows faster, so that it forgets the first weights."""
        if self.recipe.ema_decay is not None:
            decay = min(self.recipe.ema_decay, (step + 1) / (step + 10))
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)

    def curve(self) -> dict[str, float]:
        """The measures of this moment."""
        return {f"heldout/{name}": value for name, value in self.measure().items()}

    def finish(self) -> None:
        """Measure, save the scorer to `model/`, write summary and report."""
        began, before = time.monotonic(), self.state.baseline
        after = self.measure()
        with self.averaged():
            write_model(self.scorer, self.directory.folder / "model")
        both = {name: {"before": before["measures"].get(name), "after": value} for name, value in after.items()}
        summary = {
            "recipe": type(self.recipe).__name__,
            "seed": self.recipe.seed,
            "wall_seconds": before["seconds"] + self.state.trained_seconds + time.monotonic() - began,
            "train_seconds": self.state.trained_seconds,
            "steps": self.state.step,
            "parameters": sum(p.numel() for p in self.scorer.parameters()),
            "rewards": {},
            "judges": {},
            "measures": both,  # of the scorer, on examples that training never sees
            "diversity": {"before": None, "after": None, "parts": {}},
        }
        self.directory.write_json("summary.json", summary)
        report = write_report(self.directory.folder)
        for name, change in both.items():
            self.display.say(f"{name}: {change['before']:.3f} -> {change['after']:.3f}")
        self.display.say(f"model: {self.directory.folder / 'model'}\nreport: {report}")

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The data's measures of the scorer, with the averaged weights where the recipe keeps them."""
        self.scorer.eval()
        with self.averaged(), self.runtime.autocast():
            return {name: float(value) for name, value in self.data.measure(self.scorer).items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in place of the trained weights."""
        if self.recipe.ema_decay is None:
            yield
            return
        own = [p.detach().clone() for p in self.parameters]
        put(self.parameters, self.ema)
        try:
            yield
        finally:
            put(self.parameters, own)

    # commits

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and saved buffers of the scorer, each once, and the average."""
        average = {f"ema/{i}": value for i, value in enumerate(self.ema)}
        return {f"weights/{name}": value.detach() for name, value in own_tensors(self.scorer).items()} | average

    def values(self) -> dict[str, Any]:
        """Nothing: the data of a step follow from its number."""
        return {}

    def load(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Continue from what a checkpoint held."""
        own = own_tensors(self.scorer)
        put(list(own.values()), [tensors[f"weights/{name}"] for name in own])
        put(self.ema, [tensors[f"ema/{i}"] for i in range(len(self.ema))])


@torch.no_grad()
def put(targets: list[Any], values: list[torch.Tensor]) -> None:
    """Copy values into tensors, in place."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; what two layers share stands once."""
    kept = module.state_dict(keep_vars=True)
    once = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: value for name, value in once.items() if name in kept}


def write_model(scorer: Any, folder: Path) -> None:
    """`scorer.save` to a folder aside, which then takes the place of `folder`."""
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    scorer.save(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
