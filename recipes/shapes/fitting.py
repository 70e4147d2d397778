"""One training loop for a budget of wall time: averaged weights, a checkpoint a minute, and a resume from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

SAVE_SECONDS = 60


@dataclass(frozen=True)
class Schedule:
    """AdamW's settings and how its learning rate runs over the budget."""

    minutes: float
    peak_lr: float
    last_lr: float = 2e-5
    warmup_steps: int = 50
    constant: float = 0.5  # share of the budget before the cosine begins
    weight_decay: float = 0.0
    ema_decay: float = 0.999

    def learning_rate(self, step: int, done: float) -> float:
        """Warm-up, constant, then a cosine over what remains of the budget; `done` in [0, 1]."""
        falling = max(0.0, (done - self.constant) / (1 - self.constant))
        rate = self.last_lr + (self.peak_lr - self.last_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, falling)))
        return min(1.0, (step + 1) / self.warmup_steps) * rate


@torch.no_grad()
def fit(
    module: nn.Module,
    loss_at: Callable[[int, float], torch.Tensor],
    schedule: Schedule,
    checkpoint: Path,
    on_save: Callable[[float, int, float], None],
) -> None:
    """Minimise `loss_at(step, share of the budget spent)` over all parameters of `module`, which holds the averaged
    weights afterwards.

    `checkpoint` is written every minute; where it exists, training goes on from it and its time counts.

    Args:
        on_save: called with (minutes, steps, running loss) while the module holds the averaged weights.
    """
    parameters = list(module.parameters())
    ema = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.peak_lr, betas=(0.9, 0.99), weight_decay=schedule.weight_decay
    )
    step, spent, running = 0, 0.0, float("nan")
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        set_parameters(parameters, state["parameters"])
        ema, step, spent, running = state["ema"], state["step"], state["spent"], state["running"]
        optimizer.load_state_dict(state["optimizer"])
    began = saved = time.monotonic()

    def save() -> None:
        seconds = spent + time.monotonic() - began
        live = [p.detach().clone() for p in parameters]
        state = {"parameters": live, "ema": ema, "optimizer": optimizer.state_dict()}
        state |= {"step": step, "spent": seconds, "running": running}
        torch.save(state, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)
        set_parameters(parameters, ema)
        on_save(seconds / 60, step, running)
        set_parameters(parameters, live)

    while (done := (spent + time.monotonic() - began) / (60 * schedule.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step, done)
        with torch.enable_grad():
            loss = loss_at(step, done)
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(schedule.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - decay)
        step += 1
        running = loss.item() if math.isnan(running) else running + 0.02 * (loss.item() - running)
        if time.monotonic() - saved > SAVE_SECONDS:
            saved = time.monotonic()
            save()
    save()
    set_parameters(parameters, ema)


@torch.no_grad()
def set_parameters(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
