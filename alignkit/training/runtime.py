"""Device, precision and processes: the only place that knows accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from alignkit.errors import AlignkitError, RecipeError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Runtime:
    """One process of a run. No module is wrapped: after the last backward one flat all-reduce sums the gradients."""

    def __init__(self, precision: str) -> None:
        # Precision is ours (`autocast`); without "no" accelerate would read one from its environment.
        self.accelerator = Accelerator(mixed_precision="no")
        self.device = self.accelerator.device
        if precision == "fp16" and self.device.type != "cuda":
            raise RecipeError(
                f"precision='fp16' needs CUDA and this run is on {self.device.type}; use 'fp32' or 'bf16'"
            )
        if precision != "fp32" and self.device.type == "mps":
            raise RecipeError(f"precision={precision!r} is not run on mps; use 'fp32'")
        self.dtype = DTYPES[precision]
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.tracker: Accelerator | None = None
        self.scaler = torch.amp.GradScaler("cuda") if precision == "fp16" else None  # type: ignore[attr-defined]

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision as asked for; fp32 is fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: torch.Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def sum(self, value: float) -> float:
        """The sum of a number over processes."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return float(tensor)

    def max(self, value: int) -> int:
        """The largest of a number over processes."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def optimizer_step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter], max_norm: float
    ) -> float:
        """Sum gradients over processes, check them, clip, step. Returns the gradient norm before clipping.

        Raises:
            AlignkitError: a gradient is not finite; parameters are untouched.
        """
        self._sum_gradients(parameters)
        if self.scaler:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        if not bool(norm.isfinite()):
            optimizer.zero_grad(set_to_none=True)
            if self.scaler and self.scaler.get_scale() > 1:
                self.scaler.update(self.scaler.get_scale() / 2)
                return float("nan")
            raise AlignkitError(
                f"the gradient norm is not finite ({float(norm)}); the weights were left as they were. Usual causes: a "
                "reward or decoder in fp16 (use bf16 or fp32), a learning rate that is too high, or noise level near 0"
            )
        if self.scaler:
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        if self.world == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        pieces = flat.split([g.numel() for g in gradients])
        for parameter, piece, like in zip(parameters, pieces, gradients, strict=True):
            parameter.grad = piece.view_as(like).clone()

    def check_equal(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """After the first step every process must hold the same weights.

        Raises:
            AlignkitError: they differ, so the processes train alone.
        """
        if self.world == 1:
            return
        total = torch.stack([p.detach().double().sum() for p in parameters]).sum()
        both = torch.stack([total, -total])
        dist.all_reduce(both, dist.ReduceOp.MAX)
        if float(both[0] + both[1]) != 0.0:
            raise AlignkitError("after the first update the processes hold different weights: gradients do not meet")

    def track(self, tracker: str, folder: Path) -> Callable[[], None]:
        """Start TensorBoard or W&B beside the run's own files; returns what ends it.

        Raises:
            RecipeError: the tracker's package is not installed.
        """
        if tracker == "none" or not self.main:
            return lambda: None
        if importlib.util.find_spec(tracker) is None:
            raise RecipeError(f"tracker={tracker!r} needs its package: pip install {tracker}")
        self.tracker = Accelerator(log_with=tracker, project_dir=str(folder))
        self.tracker.init_trackers(folder.name)
        return self.tracker.end_training

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of one round to the tracker, if there is one."""
        if self.tracker is not None:
            self.tracker.log(dict(metrics), step=step)

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()
