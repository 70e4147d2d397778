"""A run directory as data. A run may be unfinished, killed or damaged: what is missing is listed, not raised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from alignkit.errors import CheckpointError


@dataclass(frozen=True)
class Picture:
    """One sample shown in the report: its file, and what each reader read in it.

    Attributes:
        scale: how many times the file's sides are those of the sample; clips are enlarged to be seen.
    """

    file: Path
    prompt: str
    reads: Mapping[str, str]
    right: bool | None
    scale: int = 1


@dataclass(frozen=True)
class Grid:
    """One model's samples of fixed prompts and seeds; of clips also a sheet, a row of frames for each."""

    title: str
    note: str
    pictures: tuple[Picture, ...]
    sheet: Path | None = None


@dataclass(frozen=True)
class Change:
    """A number before and after training; `None` where it was not measured."""

    before: float | None
    after: float | None


@dataclass(frozen=True)
class Series:
    """One metric over the steps at which it was logged; only finite values, `skipped` counts the others."""

    steps: tuple[float, ...]
    values: tuple[float, ...]
    skipped: int = 0


@dataclass(frozen=True)
class RunRecord:
    """Everything a run directory says, and sentences about what it lacks."""

    folder: Path
    recipe: Mapping[str, Any]
    env: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: Mapping[str, Series]
    grids: tuple[Grid, ...]
    missing: tuple[str, ...]

    def changes(self, kind: str) -> dict[str, Change]:
        """`summary[kind]`, for `rewards`, `judges`, `measures` or `own_scheduler`, by name."""
        return as_changes(self.summary.get(kind))


def read_run(folder: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        CheckpointError: the folder does not exist.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a run directory; `alignkit run NAME` makes one under runs/")
    missing: list[str] = []
    recipe = _read_object(folder / "recipe.json", "which settings were used is not known", missing)
    env = _read_object(folder / "env.json", "versions and device are not known", missing)
    unfinished = "the run has not finished or was stopped, and the numbers below are the last it recorded"
    summary = _read_object(folder / "summary.json", unfinished, missing)
    metrics = _read_metrics(folder / "metrics.jsonl", missing)
    draws = "measures" not in summary  # a reward model draws nothing
    grids = _read_grids(folder / "samples", missing) if draws else ()
    return RunRecord(folder, recipe, env, summary, metrics, grids, tuple(missing))


def number(value: Any) -> float | None:
    """A finite number, or None for anything else that a JSON file can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if isfinite(value) else None


def as_changes(entry: Any) -> dict[str, Change]:
    """`{name: {"before": x, "after": y}}` as changes; what is not of that form is left out."""
    if not isinstance(entry, Mapping):
        return {}
    pairs = {str(name): pair for name, pair in entry.items() if isinstance(pair, Mapping)}
    return {name: Change(number(pair.get("before")), number(pair.get("after"))) for name, pair in pairs.items()}


def _read_object(file: Path, consequence: str, missing: list[str]) -> dict[str, Any]:
    if not file.is_file():
        missing.append(f"{file.name} is missing: {consequence}.")
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        missing.append(f"{file.name} could not be read ({error}): {consequence}.")
        return {}
    if not isinstance(content, dict):
        missing.append(f"{file.name} holds a {type(content).__name__} instead of an object: {consequence}.")
        return {}
    return content


def _read_metrics(file: Path, missing: list[str]) -> dict[str, Series]:
    if not file.is_file():
        missing.append("metrics.jsonl is missing: there are no curves.")
        return {}
    points: dict[str, list[tuple[float, Any]]] = {}
    broken = 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            broken += 1  # the last line of a killed run may be cut
            continue
        step = number(row.get("step")) if isinstance(row, dict) else None
        if step is None:
            broken += 1
            continue
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                points.setdefault(key, []).append((step, value))
    if broken:
        missing.append(f"metrics.jsonl: {broken} line(s) could not be read and are left out.")
    return {key: _series(pairs) for key, pairs in points.items()}


def _series(pairs: list[tuple[float, Any]]) -> Series:
    kept = [(step, float(value)) for step, value in pairs if isfinite(value)]
    steps, values = tuple(step for step, _ in kept), tuple(value for _, value in kept)
    return Series(steps, values, len(pairs) - len(kept))


def _read_grids(folder: Path, missing: list[str]) -> tuple[Grid, ...]:
    index = folder / "index.json"
    if not index.is_file():
        missing.append("samples/index.json is missing: there are no pictures.")
        return ()
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        missing.append(f"samples/index.json could not be read ({error}): there are no pictures.")
        return ()
    entries = [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []
    if not entries:
        missing.append("samples/index.json lists no grids: there are no pictures.")
    return tuple(
        Grid(
            title=str(entry.get("title", "untitled")),
            note=str(entry.get("note") or ""),
            pictures=tuple(_picture(folder, item) for item in _objects(entry.get("images"))),
            sheet=folder / entry["sheet"] if isinstance(entry.get("sheet"), str) else None,
        )
        for entry in entries
    )


def _picture(folder: Path, item: Mapping[str, Any]) -> Picture:
    reads = item.get("reads")
    right, scale = item.get("right"), item.get("scale")
    return Picture(
        file=folder / str(item.get("file", "")),
        prompt=str(item.get("prompt", "")),
        reads={str(k): str(v) for k, v in reads.items()} if isinstance(reads, dict) else {},
        right=right if isinstance(right, bool) else None,
        scale=scale if type(scale) is int and scale > 0 else 1,
    )


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
