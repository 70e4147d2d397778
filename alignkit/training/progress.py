"""What a person sees while a run goes on: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOWN = ("reward/total", "policy/kl", "groups/zero_std_fraction", "train/loss", "train/accuracy")


class Display:
    """Sentences and a bar. Only the main process shows anything."""

    def __init__(self, total: int, enabled: bool = True) -> None:
        self.console = Console(soft_wrap=True, highlight=False, quiet=not enabled)
        self.total, self.last_line = total, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        rest = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"))
        self.bar = Progress(*columns, *rest, console=self.console, transient=False)
        self.live = enabled and self.console.is_terminal
        self.task: Any = None

    def say(self, sentence: str) -> None:
        """One line."""
        self.console.print(sentence, markup=False)

    def start(self, step: int) -> None:
        """Show the bar of the training rounds."""
        if self.live:
            self.bar.start()
            self.task = self.bar.add_task("training", total=self.total, completed=step, numbers="")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A round is done."""
        numbers = "  ".join(f"{name} {metrics[name]:.3g}" for name in SHOWN if name in metrics)
        if self.task is not None:
            self.bar.update(self.task, completed=step, numbers=numbers)
        elif step == 1 or step == self.total or time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            self.say(f"step {step}/{self.total}  {numbers}")

    def stop(self) -> None:
        """Take the bar down."""
        if self.task is not None:
            self.bar.stop()
            self.task = None
