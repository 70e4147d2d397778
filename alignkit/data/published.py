"""Published preference data as they are: what the columns of each data set mean.

A reader yields a `Comparison` for two samples of a prompt, or a `Rated` for one; it judges nothing, and media are
named, not read. Columns and their meaning are those of the data sets' own cards.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.data.comparisons import Cells, Comparison, Dimension, Facts, Rated, Rows, of_files, schema, table_rows
from alignkit.data.stored import Embedded, arrow, damaged
from alignkit.errors import DataError, RecipeError


def pickapic(path: Path, dimension: Dimension) -> Rows:
    """Pick-a-Pic v1, v2 (2305.01569): `label_0` and `label_1` are 1 and 0, or both 0.5 for a tie."""
    for file in parquet_files(path):
        yield from _pickapic_file(file)


def parquet_files(path: Path) -> list[Path]:
    """A file itself; of a folder as the hub lays it out the training split, else all of its parquet files."""
    if not path.is_dir():
        return [path]
    return sorted(path.glob("train-*.parquet")) or sorted(path.glob("*.parquet"))


PICKAPIC = ("caption", "label_0", "label_1", "has_label", "image_0_uid", "image_1_uid")


def _pickapic_file(file: Path) -> Rows:
    pyarrow, parquet = arrow(file)
    names = [name for name in PICKAPIC if name in schema(file)]
    total = 0
    try:
        with parquet.ParquetFile(file) as table:
            for group in range(table.num_row_groups):
                rows = table.read_row_group(group, columns=names).to_pylist()
                sizes = [_present(table, group, f"jpg_{side}") for side in (0, 1)]
                for index, row in enumerate(rows):
                    total += 1
                    there = [present[index] for present in sizes]
                    yield _picked(Cells(file, total, row), group, index, there)
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(file, error) from error


def _present(table: Any, group: int, column: str) -> list[bool]:
    """Where a column is filled, by the file's statistics where they say."""
    at = table.schema_arrow.names.index(column)
    known = table.metadata.row_group(group)
    statistics = known.column(at).statistics
    if statistics is not None and statistics.has_null_count and statistics.null_count == 0:
        return [True] * known.num_rows
    return [cell.is_valid for cell in table.read_row_group(group, columns=[column]).column(0)]


def _picked(cells: Cells, group: int, index: int, there: list[bool]) -> Comparison:
    sides = [
        Embedded(cells.path, group, index, f"jpg_{i}", str(cells.row.get(f"image_{i}_uid") or "")) if there[i] else None
        for i in (0, 1)
    ]
    labels = [cells.number_or_none("label_0"), cells.number_or_none("label_1")]
    unknown = cells.row.get("has_label") is False or None in labels
    verdict = None if unknown else labels[0] - labels[1]  # type: ignore[operator]
    prompt = cells.prompt(cells.need("caption"))
    return Comparison(cells.where, prompt, None, sides[0], sides[1], verdict, source="pickapic")


def hpdv2(path: Path, dimension: Dimension) -> Rows:
    """HPDv2 (2306.09341): training pairs with `human_preference` [1, 0]; test rows with `rank`, 1 = best."""
    for number, row in table_rows(path):
        cells = Cells(path, number, row)
        prompt = cells.prompt(cells.need("prompt"))
        names = cells.need("file_path" if "file_path" in row else "image_path")
        # both as "higher is better"
        marks = list(row["human_preference"]) if "human_preference" in row else [-r for r in cells.need("rank")]
        if len(names) != len(marks):
            raise DataError(f"{cells.where}: {len(names)} pictures and {len(marks)} labels")
        for i, j in itertools.combinations(range(len(names)), 2):
            yield of_files(cells, prompt, (names[i], names[j]), marks[i] - marks[j], "hpdv2")


def hpdv3(path: Path, dimension: Dimension) -> Rows:
    """HPDv3 (2508.03789): `path1` is preferred over `path2`; `choice_dist` are the annotators' votes for each."""
    for number, row in table_rows(path):
        cells = Cells(path, number, row)
        names = (cells.need("path1"), cells.need("path2"))
        votes = row.get("choice_dist")
        verdict = 1.0 if not votes else 0.0 if votes[0] == votes[1] else 1.0
        yield of_files(cells, cells.prompt(cells.need("prompt")), names, verdict, "hpdv3")


RATINGS = ("overall_rating", "image_text_alignment_rating", "fidelity_rating")


def imagerewarddb(path: Path, dimension: Dimension) -> Rows:
    """ImageRewardDB (2304.05977): several pictures per `prompt_id`, `rank` 1 = best; as samples with reward -rank."""
    for number, row in table_rows(path):
        cells = Cells(path, number, row)
        rank = cells.number_or_none("rank")
        ratings = {name: value for name in RATINGS if (value := cells.number_or_none(name)) is not None}
        yield Rated(
            cells.where,
            cells.prompt(cells.need("prompt")),
            str(cells.need("prompt_id")),
            cells.at("image_path", cells.need("image_path")),
            reward=None if rank is None else -rank,
            rewards=ratings,
            source="imagerewarddb",
        )


VERDICTS = {"a": 1.0, "b": -1.0, "same": 0.0, "": None}


def videogen(path: Path, dimension: Dimension) -> Rows:
    """VideoGen-RewardBench and VideoAlign (2501.13918): VQ, MQ, TA (and Overall) are A, B or same.

    What the table says of either video (`fps_A, num_frames_A, A_model`, and of B) is kept as the facts of that side.
    """
    for number, row in table_rows(path):
        cells = Cells(path, number, row)
        names = (cells.need("path_A"), cells.need("path_B"))
        prompt = cells.prompt(cells.need("prompt"))
        verdict = _vote(cells, _dimensions(cells, dimension))
        facts = (_facts(cells, "A"), _facts(cells, "B"))
        yield of_files(cells, prompt, names, verdict, "videogen-rewardbench", "video", facts=facts)


def _facts(cells: Cells, side: str) -> Facts:
    found = {"fps": cells.number_or_none(f"fps_{side}"), "num_frames": cells.number_or_none(f"num_frames_{side}")}
    if found["num_frames"] is not None:
        found["num_frames"] = int(found["num_frames"])
    facts = {**found, "model": cells.row.get(f"{side}_model") or None}
    return {name: value for name, value in facts.items() if value is not None}


def _dimensions(cells: Cells, asked: Dimension) -> Mapping[str, float]:
    known = [name for name in ("VQ", "MQ", "TA", "Overall") if name in cells.row]
    if isinstance(asked, Mapping):
        chosen = dict(asked)
    elif asked is not None:
        chosen = {asked: 1.0}
    else:
        chosen = {"Overall": 1.0} if "Overall" in known else dict.fromkeys(known, 1.0)
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise RecipeError(f"dimension={unknown[0]!r}; {cells.path.name} has {', '.join(known) or 'none'}")
    return chosen


def _vote(cells: Cells, weights: Mapping[str, float]) -> float | None:
    """The weighted sum of the dimensions' verdicts; None where none of them has one."""
    total, said = 0.0, False
    for name, weight in weights.items():
        word = str(cells.row[name] or "").strip().lower()
        if word not in VERDICTS:
            raise DataError(f"{cells.where}, column {name!r} holds {cells.row[name]!r}; expected A, B or same")
        verdict = VERDICTS[word]
        if verdict is not None:
            total, said = total + weight * verdict, True
    return total if said else None


def trl(path: Path, dimension: Dimension) -> Rows:
    """TRL's vision preference rows (`prompt, chosen, rejected`) and unpaired ones (`prompt, completion, label`).

    Sides are paths, `{"path": ...}`, or conversations with one image; prompts are texts or conversations.
    """
    for number, row in table_rows(path):
        cells = Cells(path, number, row)
        prompt = cells.prompt(_spoken(cells, cells.need("prompt")))
        if "completion" in row:
            label = cells.need("label")
            if not isinstance(label, bool):
                raise DataError(f"{cells.where}, column 'label' holds {label!r}; expected true or false")
            medium = cells.at("completion", _pictured(cells, row["completion"], "completion"))
            yield Rated(cells.where, prompt, None, medium, label=label, source="trl")
        else:
            names = tuple(_pictured(cells, cells.need(side), side) for side in ("chosen", "rejected"))
            yield of_files(cells, prompt, (names[0], names[1]), 1.0, "trl")


def _spoken(cells: Cells, value: Any) -> Any:
    """The text of a prompt, also of a conversation's user."""
    parts = [p for m in value if m.get("role") == "user" for p in _parts(m)] if isinstance(value, list) else None
    if parts is None:
        return value
    return " ".join(p["text"] for p in parts if p.get("type") == "text")


def _pictured(cells: Cells, value: Any, column: str) -> str | None:
    """The path of the one picture of a side; None where the side is empty."""
    if value is None or value in ("", []):
        return None
    if isinstance(value, Mapping):
        value = [{"content": [{"type": "image", "image": value}]}]
    if isinstance(value, list):
        pictures = [p.get("image", p) for m in value for p in _parts(m) if p.get("type") == "image"]
        if len(pictures) != 1:
            raise DataError(f"{cells.where}, column {column!r} has {len(pictures)} images; expected one per side")
        value = pictures[0].get("path") if isinstance(pictures[0], Mapping) else pictures[0]
        if value is None:
            raise DataError(f"{cells.where}, column {column!r} has a picture without a path; save pictures as files")
    if not isinstance(value, str) or "\n" in value or len(value) > 1000:
        raise DataError(
            f"{cells.where}, column {column!r} is text and no picture: TRL's text preferences cannot train a generator"
        )
    return value


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
