"""What a run keeps on disk: recipe, environment, metrics, samples, checkpoints, adapters, summary, report."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from alignkit.errors import CheckpointError

PACKAGES = ("alignkit", "torch", "diffusers", "transformers", "peft", "accelerate", "rapidocr", "onnxruntime")


class RunDir:
    """A run directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints, self.samples, self.lora = folder / "checkpoints", folder / "samples", folder / "lora"

    @classmethod
    def create(cls, folder: Path) -> RunDir:
        """A new run directory.

        Raises:
            CheckpointError: the folder already holds a run; `alignkit resume` continues it.
        """
        if (folder / "recipe.json").exists():
            raise CheckpointError(
                f"{folder} already holds a run; `alignkit resume {folder}` continues it, --out DIR starts another"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written ({error}); choose another with --out DIR") from error
        return cls(folder)

    def write_environment(self, device: str, command: list[str]) -> None:
        """`env.json`: versions, device, command."""
        record = {
            "versions": {name: _version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": device,
            "cpu_count": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "commit": _commit(),
            "command": command,
        }
        self.write_json("env.json", record)

    def write_json(self, name: str, record: Any) -> None:
        """Write aside, then rename, so that a reader never sees half a file."""
        aside = self.folder / f".{name}.tmp"
        aside.write_text(json.dumps(record, indent=1), encoding="utf-8")
        aside.replace(self.folder / name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to `metrics.jsonl`."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed run writes again; a torn last line goes too."""
        file = self.folder / "metrics.jsonl"
        if not file.exists():
            return
        kept = [line for line in file.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        aside = self.folder / ".metrics.tmp"
        aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        aside.replace(file)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that alignkit runs from, or None in an installed wheel."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
