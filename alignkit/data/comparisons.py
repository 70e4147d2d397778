"""Rows of preference files before anything is judged: two samples side by side, or one that was rated."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from alignkit.data.prompts import prompt_of, read_csv, read_jsonl
from alignkit.data.stored import Medium, StoredLatents, arrow, damaged, latents_at, located
from alignkit.errors import DataError
from alignkit.types import Prompt

Kind = Literal["image", "video"]
Dimension = str | Mapping[str, float] | None
Numbers = Mapping[str, float]
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A row that sets two samples of one prompt side by side.

    Attributes:
        where: file and row.
        prompt, key: text and columns; what the file identifies the prompt by, None: nothing.
        first, second: the two media; None: the row names none.
        verdict: above 0 if the first is better, below 0 if the second, 0 for a tie, None for no label.
        missing: a named file is not there.
        rewards, latents, facts: of either side: scores, where its latents lie, and what else the file says of it, such
            as a video's fps, num_frames and model.
    """

    where: str
    prompt: Prompt
    key: int | str | None
    first: Medium | None
    second: Medium | None
    verdict: float | None
    kind: Kind = "image"
    margin: float | None = None
    weight: float = 1.0
    source: str = ""
    missing: bool = False
    rewards: tuple[Numbers, Numbers] = field(default_factory=lambda: ({}, {}))
    latents: tuple[StoredLatents | None, StoredLatents | None] = (None, None)
    facts: tuple[Facts, Facts] = field(default_factory=lambda: ({}, {}))


@dataclass(frozen=True)
class Rated:
    """A row about one sample; `medium` is None where the named file is not there."""

    where: str
    prompt: Prompt
    key: int | str | None
    medium: Medium | None
    kind: Kind = "image"
    reward: float | None = None
    rewards: Numbers = field(default_factory=dict)
    label: bool | None = None
    latents: StoredLatents | None = None
    source: str = ""


Rows = Iterator[Comparison | Rated]


def schema(path: Path) -> list[str]:
    """Column names of a parquet file."""
    pyarrow, parquet = arrow(path)
    try:
        with parquet.ParquetFile(path) as table:
            return table.schema_arrow.names
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(path, error) from error


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Entries of a JSON list, counted from 1; such files are read whole."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise DataError(f"{path} holds no list of objects")
    yield from enumerate(entries, start=1)


def table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a `.jsonl`, `.json`, `.csv` or parquet file; parquet in batches."""
    if path.suffix.lower() != ".parquet":
        yield from {".jsonl": read_jsonl, ".csv": read_csv, ".json": _read_json}[path.suffix.lower()](path)
        return
    pyarrow, parquet = arrow(path)
    try:
        with parquet.ParquetFile(path) as table:
            batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=1024))
            yield from enumerate(itertools.chain.from_iterable(batches), start=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(path, error) from error


@dataclass(frozen=True)
class Cells:
    """One row being read, with errors that name it."""

    path: Path
    number: int
    row: Mapping[str, Any]

    @property
    def where(self) -> str:
        """File and row."""
        return f"{self.path.name}, row {self.number}"

    def need(self, column: str) -> Any:
        """A cell that every row of the format has.

        Raises:
            DataError: it is missing; names the row and the columns found.
        """
        if column not in self.row:
            found = ", ".join(self.row) or "none"
            raise DataError(f"{self.where} has no column {column!r}; columns found: {found}")
        return self.row[column]

    def number_or_none(self, column: str) -> float | None:
        """A finite number, or None for an empty cell."""
        value = self.row.get(column)
        if value is None or value == "":
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if number != number or abs(number) == float("inf"):
            raise DataError(f"{self.where}, column {column!r} holds {value!r}; expected a finite number")
        return number

    def mapping(self, column: str, expected: str = "an object") -> Facts:
        """An object; an empty one for an empty cell."""
        value = self.row.get(column) or {}
        if not isinstance(value, Mapping):
            raise DataError(f"{self.where}, column {column!r} holds {value!r}; expected {expected}")
        return value

    def numbers(self, column: str) -> Numbers:
        """{name: number}; scores that could not be computed (null) are left out."""
        value = self.mapping(column, "an object of numbers")
        inner = Cells(self.path, self.number, value)
        known = {name: inner.number_or_none(name) for name in value}
        return {name: number for name, number in known.items() if number is not None}

    def at(self, column: str, value: Any) -> Path | None:
        """The file a cell names; None where it is not there."""
        try:
            return located(self.path.parent, value, column)
        except DataError as error:
            raise DataError(f"{self.where}: {error}") from error

    def latents(self, column: str) -> StoredLatents | None:
        """Latents that a cell names, if any."""
        value = self.row.get(column)
        try:
            return None if not value else latents_at(self.path.parent, value, column)
        except DataError as error:
            raise DataError(f"{self.where}: {error}") from error

    def prompt(self, text: Any, columns: Mapping[str, Any] | None = None) -> Prompt:
        """The row's prompt, not numbered yet."""
        return prompt_of(self.where, 0, {**(columns or {}), "prompt": text}, self.path.parent)


def of_files(
    cells: Cells,
    prompt: Prompt,
    names: tuple[Any, Any],
    verdict: float | None,
    source: str,
    kind: Kind = "image",
    weight: float = 1.0,
    facts: tuple[Facts, Facts] = ({}, {}),
) -> Comparison:
    """A comparison of two named files."""
    found = [cells.at("path", name) if name else None for name in names]
    missing = any(name and path is None for name, path in zip(names, found, strict=True))
    rest = {"kind": kind, "weight": weight, "source": source, "missing": missing, "facts": facts}
    return Comparison(cells.where, prompt, None, found[0], found[1], verdict, **rest)
