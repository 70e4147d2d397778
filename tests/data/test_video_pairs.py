"""Tables of video pairs: the verdict of each dimension, what a table says of a clip, and memory that does not grow."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from alignkit.data import stored
from alignkit.data.conversion import write_rows
from alignkit.data.preferences import load_pairs, stream_pairs
from alignkit.data.stored import PIECE, Medium, same_content
from alignkit.data.video import read_video, write_mp4

HEADER = "path_A,path_B,prompt,VQ,MQ,TA,Overall,fps_A,num_frames_A,fps_B,num_frames_B,A_model,B_model\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Clips `A.mp4`, dark, and `B.mp4`, light, of 9 and 5 frames."""
    for name, grey, frames in (("A", 0.2, 9), ("B", 0.8, 5)):
        write_mp4(tmp_path / f"{name}.mp4", torch.full((frames, 3, 32, 32), grey), fps=8)
    return tmp_path


def bench(folder: Path, rows: int) -> Path:
    """As VideoGen-RewardBench has it: in turn A wins, B wins, both are the same, in Overall; in VQ always A."""
    verdicts = ("A", "B", "same")
    lines = [f"A.mp4,B.mp4,prompt {i % 50},A,B,same,{verdicts[i % 3]},8,9,8.0,5,one,two\n" for i in range(rows)]
    path = folder / f"{rows}.csv"
    path.write_text(HEADER + "".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("dimension", "wins"), [(None, [2, 2]), ("Overall", [2, 2]), ("VQ", [6, 0]), ("MQ", [0, 6]), ("TA", [0, 0])]
)
def test_each_dimension_has_its_own_verdict_and_the_same_is_a_tie(
    dimension: str | None, wins: list[int], folder: Path
) -> None:
    left: Counter[str] = Counter()
    rows = list(stream_pairs(bench(folder, 6), dimension=dimension, left_out=left))
    chosen = Counter(Path(str(row.chosen)).stem for row in rows)
    assert [chosen["A"], chosen["B"]] == wins and left["ties"] == 6 - sum(wins)


def test_what_a_table_says_of_a_clip_goes_with_its_side_and_is_kept(folder: Path, tmp_path: Path) -> None:
    one = {"fps": 8.0, "num_frames": 9, "model": "one"}
    two = {"fps": 8.0, "num_frames": 5, "model": "two"}
    found = load_pairs(bench(folder, 2))
    assert [(row.chosen_facts, row.rejected_facts) for row in found.rows] == [(one, two), (two, one)]
    assert [str(row.prompt) for row in found.rows] == ["prompt 0", "prompt 1"]
    assert all(not row.prompt.columns for row in found.rows)  # the sampler would take num_frames for an argument
    again = load_pairs(write_rows(found, tmp_path / "own"))
    assert [(row.chosen_facts, row.rejected_facts) for row in again.rows] == [(one, two), (two, one)]
    assert read_video(Path(str(again.rows[0].chosen))).shape == (9, 3, 32, 32)


def peak(read: Callable[[Path], Iterator[object]], table: Path) -> int:
    """Bytes that were in use at once while the rows of a table were read and forgotten."""
    tracemalloc.start()
    deque(read(table), maxlen=0)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def kept(path: Path) -> Iterator[object]:
    yield list(stream_pairs(path))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_the_memory_of_a_stream_does_not_grow_with_the_table_and_no_clip_is_opened(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(medium: Medium) -> Iterator[bytes]:
        raise AssertionError(f"{medium} was opened")

    def table(rows: int) -> Path:
        if kind == "csv":
            return bench(folder, rows)
        row = json.dumps({"prompt": "a", "chosen": "A.mp4", "rejected": "B.mp4"}) + "\n"
        (folder / f"{rows}.jsonl").write_text(row * rows, encoding="utf-8")
        return folder / f"{rows}.jsonl"

    monkeypatch.setattr(stored, "contents", opened)
    peak(stream_pairs, table(20))  # what is imported and compiled at first use
    few, many = peak(stream_pairs, table(60)), peak(stream_pairs, table(300))
    assert many < few + 60_000
    assert peak(kept, table(300)) > few + 150_000  # the measure can tell


def test_two_clips_are_compared_a_piece_at_a_time(tmp_path: Path) -> None:
    for name, end in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).write_bytes(b"0" * (24 * PIECE) + end)
    tracemalloc.start()
    assert not same_content(tmp_path / "a", tmp_path / "b") and same_content(tmp_path / "a", tmp_path / "c")
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found < 8 * PIECE
