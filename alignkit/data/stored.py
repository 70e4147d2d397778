"""Where a sample lies: pictures and videos as files or inside a table, latents inside a safetensors file."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torchvision.transforms.functional import pil_to_tensor

from alignkit.data.media import inside, load_image
from alignkit.data.video import read_video as read_video  # its callers know it from here
from alignkit.errors import DataError

FIRST_FRAME = "000.png"
"""A folder of frames begins with this file; the others follow in the order of their names."""
PIECE = 2**20  # bytes of a file that are in memory at a time


@dataclass(frozen=True)
class Embedded:
    """A picture whose encoded bytes stand in a parquet file. They are read when they are asked for.

    Attributes:
        file: the parquet file.
        row_group, row: where in it; `row` counts from 0 inside the row group.
        column: its column.
        uid: the picture's identity where the table has one; "": compare the bytes.
    """

    file: Path
    row_group: int
    row: int
    column: str
    uid: str = ""

    def read(self) -> bytes:
        """The encoded picture as it was stored."""
        cell = _column(self.file, self.row_group, self.column)[self.row].as_py()
        return cell["bytes"] if isinstance(cell, dict) else cell

    def __str__(self) -> str:
        return f"{self.file}, column {self.column!r}, row {self.row} of row group {self.row_group}"


Medium = Path | Embedded
"""An image or video file, a folder of frames, or a picture inside a table."""


@lru_cache(maxsize=4)  # rows that are drawn together often lie together
def _column(file: Path, row_group: int, column: str) -> Any:
    pyarrow, parquet = arrow(file)
    try:
        with parquet.ParquetFile(file) as table:
            return table.read_row_group(row_group, columns=[column]).column(0)
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(file, error) from error


def arrow(file: Path) -> tuple[Any, Any]:
    """pyarrow and its parquet module.

    Raises:
        DataError: pyarrow is not installed; says how.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{file}: reading parquet needs pyarrow: pip install 'alignkit[parquet]'") from error
    return pyarrow, parquet


def damaged(file: Path, error: Exception) -> DataError:
    """What is said of a parquet file that cannot be read."""
    return DataError(f"{file} cannot be read as parquet, it is truncated or damaged: {error}")


def located(folder: Path, name: Any, column: str) -> Path | None:
    """The file, or folder of frames, that a cell names inside `folder`; None where it is not there.

    Raises:
        DataError: the cell holds no path, or one that leaves the folder.
    """
    if not isinstance(name, str) or not name:
        raise DataError(f"column {column!r} holds {name!r}; expected the path of a file inside {folder}")
    path = Path(name)
    plain = "\0" not in name and "\\" not in name and "://" not in name
    if plain and not path.is_absolute() and ".." not in path.parts:
        if (folder / path).is_dir() and (folder / path / FIRST_FRAME).is_file():
            return _without_links_out(inside(folder, f"{path.as_posix()}/{FIRST_FRAME}").parent, folder, column)
        if not (folder / path).exists():
            return None
    return inside(folder, name)


def _without_links_out(frames: Path, folder: Path, column: str) -> Path:
    for file in frames.rglob("*"):
        if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"column {column!r}: {file} is a link out of {folder}; copy the file into the folder")
    return frames


def same_content(first: Medium, second: Medium) -> bool:
    """Whether two media are one picture or video: by identity where a table has one, else byte for byte."""
    if isinstance(first, Embedded) and isinstance(second, Embedded) and first.uid and second.uid:
        return first.uid == second.uid
    if isinstance(first, Path) and isinstance(second, Path):
        if first == second:
            return True
        if first.is_dir() != second.is_dir():
            return False
        if first.is_file() and first.stat().st_size != second.stat().st_size:
            return False
    return all(a == b for a, b in itertools.zip_longest(contents(first), contents(second)))


def contents(medium: Medium) -> Iterator[bytes]:
    """The encoded bytes, in pieces of at most `PIECE`; of a folder of frames those of one frame after the other."""
    if isinstance(medium, Embedded):
        whole = medium.read()
        yield from (whole[start : start + PIECE] for start in range(0, len(whole), PIECE))
        return
    for file in sorted(medium.glob("*.png")) if medium.is_dir() else [medium]:
        with file.open("rb") as content:
            while piece := content.read(PIECE):
                yield piece


def read_image(medium: Medium) -> torch.Tensor:
    """(3, H, W) float in [0, 1].

    Raises:
        DataError: it cannot be read as an image; names the file, and the row of a table.
    """
    if isinstance(medium, Path):
        return pil_to_tensor(load_image(medium)).float() / 255
    try:
        return pil_to_tensor(load_image(io.BytesIO(medium.read()))).float() / 255  # type: ignore[arg-type]
    except DataError as error:
        raise DataError(f"{medium}: {error}") from error


@dataclass(frozen=True)
class StoredLatents:
    """Latents of one sample under a key of a safetensors file, written in rows as `file#key`."""

    file: Path
    key: str

    def read(self, made_by: str) -> torch.Tensor | None:
        """(...) float32; None where another pipeline than `made_by` wrote them, which may mean something else.

        Raises:
            DataError: the file is damaged, or has no such key.
        """
        try:
            with safe_open(self.file, framework="pt") as stored:
                if (stored.metadata() or {}).get("pipeline", made_by) != made_by:
                    return None
                return stored.get_tensor(self.key).float()
        except (SafetensorError, OSError) as error:
            raise DataError(f"{self.file} has no latents {self.key!r}: {error}") from error


def latents_at(folder: Path, name: Any, column: str) -> StoredLatents | None:
    """What a cell `file#key` names; None where the file is not there, so that the picture is encoded instead.

    Raises:
        DataError: the cell has another form, or its path leaves the folder.
    """
    file, hash_, key = name.rpartition("#") if isinstance(name, str) else ("", "", "")
    if not hash_ or not key:
        raise DataError(f"column {column!r} holds {name!r}; expected 'file.safetensors#key'")
    found = located(folder, file, column)
    return None if found is None else StoredLatents(found, key)
