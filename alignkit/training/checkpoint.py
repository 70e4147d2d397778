"""Checkpoints that a kill at any moment cannot spoil.

A checkpoint is a folder, written aside, flushed to disk and renamed; `COMMIT.json` in it lists every file with size
and sha256. Whatever lacks a matching commit is ignored, with a sentence. Tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from alignkit.errors import CheckpointError

COMMIT = "COMMIT.json"


@dataclass(frozen=True)
class Checkpoint:
    """One committed state of a run."""

    step: int
    folder: Path
    tensors: Mapping[str, torch.Tensor]
    values: Mapping[str, Any]


def commit(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any], keep: int) -> Path:
    """Write `folder/step-N` atomically, then remove all but the newest `keep` commits.

    Raises:
        CheckpointError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, aside = folder / f"step-{step}", folder / f"tmp-step-{step}-{os.getpid()}"
    try:
        _check_space(folder, tensors)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, str(aside / "state.safetensors"))
        (aside / "state.json").write_text(json.dumps(values), encoding="utf-8")
        files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(aside.iterdir())}
        (aside / COMMIT).write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
        for file in aside.iterdir():
            _flush(file)
        _flush(aside)
        replaced = folder / f"tmp-old-{step}-{os.getpid()}"
        if target.exists():
            target.rename(replaced)
        aside.rename(target)
        _flush(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"step {step} could not be saved under {folder} ({error}); earlier checkpoints are intact. "
            "Free some space or permissions, then `alignkit resume` the run"
        ) from error
    for old in _numbered(folder)[keep:]:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder / f"step-{old}")
    return target


def newest(folder: Path, say: Any) -> Checkpoint | None:
    """The newest commit whose files are what it says; skipped ones are reported through `say(sentence)`."""
    for step in _numbered(folder):
        place = folder / f"step-{step}"
        fault = _fault(place)
        if fault is None:
            values = json.loads((place / "state.json").read_text(encoding="utf-8"))
            return Checkpoint(step, place, load_file(str(place / "state.safetensors")), values)
        say(f"checkpoint step-{step} is incomplete ({fault}); falling back to the one before")
    return None


def _fault(place: Path) -> str | None:
    try:
        files = json.loads((place / COMMIT).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"no readable {COMMIT}: {type(error).__name__}"
    for name, entry in files.items():
        file = place / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
            return f"{name} is not what was committed"
    return None


def _numbered(folder: Path) -> list[int]:
    names = [f.name.removeprefix("step-") for f in folder.glob("step-*") if f.is_dir()]
    return sorted((int(n) for n in names if n.isdigit()), reverse=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """fsync; Windows has no handles on folders to flush."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_space(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    free = shutil.disk_usage(folder).free
    if free < 1.1 * needed + 2**20:
        raise OSError(f"{needed / 2**20:.0f} MB are needed and {free / 2**20:.0f} MB are free")


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run directory for this process.

    Raises:
        CheckpointError: another process holds it.
    """
    file = folder / ".lock"
    handle = file.open("a+")
    try:
        _take(handle, folder)
        yield
    finally:
        handle.close()


def _take(handle: Any, folder: Path) -> None:
    busy = CheckpointError(f"another process is running in {folder}; wait for it, stop it, or use another --out")
    if os.name == "nt":
        import msvcrt

        try:
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError as error:
            raise busy from error
    else:
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise busy from error
