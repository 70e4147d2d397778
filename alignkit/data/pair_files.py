"""alignkit's own preference files, `pairs.jsonl` and `samples.jsonl`, and folders of pairs: read and written.

A pair is `{prompt, prompt_id, chosen, rejected, margin?, tie?, source?, weight?, chosen_rewards?, rejected_rewards?,
chosen_latents?, rejected_latents?, chosen_facts?, rejected_facts?}`, a scored sample `{prompt, prompt_id, image | video
| sample, reward?, rewards?, label?, latents?, source?}`. Paths lie inside the file's folder, latents are
`file.safetensors#key`, and every other column goes with the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.data.comparisons import Cells, Comparison, Dimension, Kind, Rated, Rows, of_files, table_rows
from alignkit.errors import DataError
from alignkit.types import Prompt

VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


ROW = frozenset(("prompt", "prompt_id", "source"))
SIDES = {f"{side}_{what}" for side in ("chosen", "rejected") for what in ("rewards", "latents", "facts")}
PAIR = ROW | SIDES | {"chosen", "rejected", "margin", "tie", "kind", "weight"}
SAMPLE = ROW | {"reward", "rewards", "label", "latents"}
"""Columns with a meaning of their own; every other column of a row goes with its prompt."""


def rows(path: Path, dimension: Dimension) -> Rows:
    """Rows of such a file, also in `.json`, `.csv` or parquet."""
    for number, row in table_rows(path):
        cells = Cells(path, number, row)
        pair = "chosen" in row or "rejected" in row
        own = PAIR if pair else SAMPLE | {_medium_column(row)}
        columns = {name: value for name, value in row.items() if name not in own}
        prompt = cells.prompt(cells.need("prompt"), columns)
        yield _own_pair(cells, prompt) if pair else _own_sample(cells, prompt)


def _own_pair(cells: Cells, prompt: Prompt) -> Comparison:
    names = (cells.row.get("chosen"), cells.row.get("rejected"))
    found = [cells.at(c, n) if n else None for c, n in zip(("chosen", "rejected"), names, strict=True)]
    margin = cells.number_or_none("margin")
    if margin is not None and margin < 0:
        raise DataError(f"{cells.where}: margin={margin}; the chosen side is the better one, swap them or drop the row")
    return Comparison(
        cells.where,
        prompt,
        _key(cells),
        found[0],
        found[1],
        0.0 if _tie(cells) or margin == 0 else 1.0,
        _kind(cells, names[0] or names[1]),
        margin,
        _weight(cells),
        str(cells.row.get("source") or cells.path.name),
        any(name and path is None for name, path in zip(names, found, strict=True)),
        (cells.numbers("chosen_rewards"), cells.numbers("rejected_rewards")),
        (cells.latents("chosen_latents"), cells.latents("rejected_latents")),
        (cells.mapping("chosen_facts"), cells.mapping("rejected_facts")),
    )


def _tie(cells: Cells) -> bool:
    """A table without types has its truth values as text."""
    value = cells.row.get("tie")
    said = value.strip().lower() if isinstance(value, str) else value
    if said in (True, "true", "1"):
        return True
    if said in (None, False, "", "false", "0"):
        return False
    raise DataError(f"{cells.where}, column 'tie' holds {value!r}; expected true or false")


def _medium_column(row: Mapping[str, Any]) -> str:
    """Which column names the sample: a prompt may have a picture or video of its own beside it."""
    return next((name for name in ("sample", "video") if row.get(name)), "image")


def _own_sample(cells: Cells, prompt: Prompt) -> Rated:
    column = _medium_column(cells.row)
    medium = cells.need(column)
    if "weight" in cells.row:
        raise DataError(f"{cells.where}: only pairs have a weight; say what a sample is worth with `reward`")
    label = cells.row.get("label")
    if label not in (None, True, False, 0, 1):
        raise DataError(f"{cells.where}, column 'label' holds {label!r}; expected true or false")
    return Rated(
        cells.where,
        prompt,
        _key(cells),
        cells.at(column, medium),
        "video" if column == "video" else _kind(cells, medium),
        cells.number_or_none("reward"),
        cells.numbers("rewards"),
        None if label is None else bool(label),
        cells.latents("latents"),
        str(cells.row.get("source") or cells.path.name),
    )


def _key(cells: Cells) -> int | str | None:
    key = cells.row.get("prompt_id")
    return key if key is None or (isinstance(key, int) and not isinstance(key, bool)) else str(key)


def _weight(cells: Cells) -> float:
    weight = cells.number_or_none("weight")
    if weight is not None and weight < 0:
        raise DataError(f"{cells.where}: weight={weight}; expected 0 or more")
    return 1.0 if weight is None else weight


def _kind(cells: Cells, name: Any) -> Kind:
    said = cells.row.get("kind")
    if said in ("image", "video"):
        return said
    video = isinstance(name, str) and (Path(name).suffix.lower() in VIDEOS or (cells.path.parent / name).is_dir())
    return "video" if video else "image"


def folders(path: Path, dimension: Dimension) -> Rows:
    """`chosen/NAME.png` and `rejected/NAME.png` with the prompt in `NAME.txt`, in `prompts/` or beside the picture."""
    files = {f.stem: f for side in ("chosen", "rejected") for f in sorted((path / side).iterdir()) if _is_medium(f)}
    for number, stem in enumerate(sorted(files), start=1):
        cells = Cells(path / "pairs", number, {})
        text = next((f for f in _texts(path, stem) if f.is_file()), None)
        if text is None:
            raise DataError(f"{path} has no prompt for {stem!r}: expected prompts/{stem}.txt or chosen/{stem}.txt")
        sides = [
            next((f for f in sorted((path / s).iterdir()) if f.stem == stem and _is_medium(f)), None)
            for s in ("chosen", "rejected")
        ]
        names = [None if side is None else f"{side.parent.name}/{side.name}" for side in sides]
        kind = "video" if files[stem].is_dir() or files[stem].suffix.lower() in VIDEOS else "image"
        prompt = cells.prompt(text.read_text(encoding="utf-8-sig").strip())
        yield of_files(cells, prompt, (names[0], names[1]), 1.0, path.name, kind)


def _is_medium(file: Path) -> bool:
    return file.is_dir() or file.suffix.lower() in VIDEOS + PICTURES


def _texts(path: Path, stem: str) -> list[Path]:
    return [path / place / f"{stem}.txt" for place in ("prompts", "chosen", "")]
