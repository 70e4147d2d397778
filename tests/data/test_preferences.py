"""Preference files of every format become the same pairs and samples, and nothing unusable is used silently."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file

from alignkit.data.conversion import write_rows
from alignkit.data.preference_formats import FORMATS, detect
from alignkit.data.preferences import load_pairs, load_samples
from alignkit.data.stored import Embedded, read_image, read_video
from alignkit.errors import DataError, RecipeError


def encoded(value: int, kind: str = "JPEG") -> bytes:
    """A small grey picture as a file holds it."""
    held = io.BytesIO()
    Image.new("RGB", (8, 8), (value,) * 3).save(held, kind)
    return held.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four grey pictures `0.png` to `3.png`, lighter and lighter, and a copy of the first, `copy.png`."""
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(60 * i, "PNG"))
    (tmp_path / "copy.png").write_bytes(encoded(0, "PNG"))
    return tmp_path


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def names(path: Path, **options: Any) -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) of every pair."""
    rows = load_pairs(path, **options).rows
    return [(str(row.prompt), Path(str(row.chosen)).name, Path(str(row.rejected)).name) for row in rows]


# alignkit's own rows


def test_a_pair_keeps_everything_its_row_says(folder: Path) -> None:
    save_file({"a": torch.arange(4.0)}, folder / "l.safetensors")
    row = {
        "prompt": "a cat",
        "prompt_id": 7,
        "chosen": "0.png",
        "rejected": "1.png",
        "margin": 0.5,
        "source": "hand",
        "weight": 2.0,
        "chosen_rewards": {"total": 1.0, "ocr": 0.25},
        "chosen_latents": "l.safetensors#a",
        "negative_prompt": "blurry",
    }
    (pair,) = load_pairs(lines(folder / "pairs.jsonl", [row])).rows
    assert (pair.prompt, pair.prompt.id, pair.prompt.columns["negative_prompt"]) == ("a cat", 7, "blurry")
    assert (pair.margin, pair.source, pair.weight, pair.kind) == (0.5, "hand", 2.0, "image")
    assert dict(pair.chosen_rewards) == {"total": 1.0, "ocr": 0.25}
    torch.testing.assert_close(pair.chosen_latents.read("AnyPipeline"), torch.arange(4.0))
    assert pair.rejected_latents is None


def test_what_is_no_pair_is_left_out_counted_and_said(folder: Path) -> None:
    both = {"chosen": "0.png", "rejected": "1.png"}
    rows = [
        {"prompt": "a", **both},
        {"prompt": "a", **both, "tie": True},
        {"prompt": "a", **both, "margin": 0},
        {"prompt": "a", "chosen": "0.png", "rejected": "copy.png"},
        {"prompt": "a", "chosen": "0.png", "rejected": "0.png"},
        {"prompt": "a", "chosen": "0.png", "rejected": "gone.png"},
        {"prompt": "a", "chosen": "0.png", "rejected": None},
    ]
    found = load_pairs(lines(folder / "pairs.jsonl", rows))
    assert len(found.rows) == 1
    assert found.sentence() == (
        "pairs.jsonl: 1 pairs of 1 prompts; left out: 2 ties, 2 with the same picture on both sides, 1 whose file is "
        "not there, 1 with a side missing"
    )


@pytest.mark.parametrize(("cell", "tie"), [("True", True), ("true", True), ("1", True), ("False", False), ("", False)])
def test_ties_are_told_in_tables_without_types_too(folder: Path, cell: str, tie: bool) -> None:
    table = folder / "p.csv"
    table.write_text(f"prompt,chosen,rejected,tie\na,0.png,1.png,0\na,1.png,2.png,{cell}\n", encoding="utf-8")
    assert load_pairs(table).left_out.get("ties", 0) == tie


@pytest.mark.parametrize(("value", "tie"), [(1, True), (1.0, True), (0, False), (None, False)])
def test_ties_may_be_numbers(folder: Path, value: float | None, tie: bool) -> None:
    row = {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}
    found = load_pairs(lines(folder / "p.jsonl", [row, {**row, "tie": value}]))
    assert found.left_out.get("ties", 0) == tie


@pytest.mark.parametrize("name", ["../up.png", "/etc/passwd", "a\\b.png", "https://x.org/a.png"])
def test_a_path_that_leaves_the_folder_is_refused_with_its_row(folder: Path, name: str) -> None:
    rows = [
        {"prompt": "a", "chosen": "0.png", "rejected": "1.png"},
        {"prompt": "a", "chosen": name, "rejected": "1.png"},
    ]
    with pytest.raises(DataError, match=r"pairs.jsonl, row 2"):
        load_pairs(lines(folder / "pairs.jsonl", rows))


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("elsewhere") / "x.png"
    outside.write_bytes(encoded(3, "PNG"))
    (folder / "link.png").symlink_to(outside)
    with pytest.raises(DataError, match="link out of"):
        load_pairs(lines(folder / "p.jsonl", [{"prompt": "a", "chosen": "link.png", "rejected": "1.png"}]))
    for name in ("clip", "other"):  # copies of a clip take all that its folder holds
        (folder / name).mkdir()
        (folder / name / "000.png").write_bytes(encoded(len(name), "PNG"))
    (folder / "clip" / "notes.txt").symlink_to(outside)
    with pytest.raises(DataError, match="notes.txt is a link out of"):
        load_pairs(lines(folder / "v.jsonl", [{"prompt": "a", "chosen": "clip", "rejected": "other"}]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"margin": -1.0}, "margin=-1"),
        ({"margin": "much"}, "expected a finite number"),
        ({"weight": -2}, "weight=-2"),
        ({"tie": "maybe"}, "column 'tie' holds 'maybe'"),
        ({"tie": 2}, "column 'tie' holds 2"),
        ({"chosen_rewards": 3}, "expected an object of numbers"),
        ({"chosen_latents": "l.safetensors"}, "file.safetensors#key"),
        ({"chosen": 5}, "expected the path of a file"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 3}, "expected text"),
    ],
)
def test_a_wrong_cell_is_named_with_its_row(folder: Path, change: dict[str, Any], words: str) -> None:
    row = {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}
    with pytest.raises(DataError, match="row 2") as refused:
        load_pairs(lines(folder / "p.jsonl", [row, {**row, **change}]))
    assert words in str(refused.value)


def test_prompts_are_told_apart_by_text_and_columns_or_by_the_ids_of_the_file(folder: Path) -> None:
    both = {"chosen": "0.png", "rejected": "1.png"}
    rows = [
        {"prompt": "a", **both},
        {"prompt": "A", **both},
        {"prompt": "a", "seed": 1, **both},
        {"prompt": "a", **both},
    ]
    assert [row.prompt.id for row in load_pairs(lines(folder / "p.jsonl", rows)).rows] == [1, 2, 3, 1]
    numbered = [{**row, "prompt_id": i} for row, i in zip(rows, (5, 6, 5, 5), strict=True)]
    assert [row.prompt.id for row in load_pairs(lines(folder / "p.jsonl", numbered[:1])).rows] == [5]
    with pytest.raises(DataError, match="prompt_id=5 is 'x' here and 'a' in an earlier row"):
        load_pairs(lines(folder / "p.jsonl", [numbered[0], {**numbered[0], "prompt": "x"}]))
    with pytest.raises(DataError, match="every row of a file has a whole number"):
        load_pairs(lines(folder / "p.jsonl", [numbered[0], rows[1]]))


def test_scored_samples_become_pairs_of_each_prompt_with_the_difference_as_margin(folder: Path) -> None:
    rows = [{"prompt": "a", "image": f"{i}.png", "reward": r} for i, r in enumerate([0.0, 2.0, 2.0])]
    found = load_pairs(lines(folder / "s.jsonl", [*rows, {"prompt": "b", "image": "3.png", "reward": 9.0}]))
    assert [(Path(str(p.chosen)).name, Path(str(p.rejected)).name, p.margin) for p in found.rows] == [
        ("1.png", "0.png", 2.0),
        ("2.png", "0.png", 2.0),
    ]
    assert dict(found.left_out) == {"ties": 1}


def test_sides_of_pairs_become_samples_with_their_rewards_or_the_share_of_pairs_they_win(folder: Path) -> None:
    plain = [("0.png", "1.png"), ("1.png", "2.png"), ("0.png", "2.png")]
    rows = [{"prompt": "a", "chosen": c, "rejected": r} for c, r in plain]
    found = load_samples(lines(folder / "p.jsonl", rows))
    assert {Path(str(s.medium)).name: (s.reward, s.label) for s in found.rows} == {
        "0.png": (1.0, True),
        "1.png": (0.5, None),
        "2.png": (0.0, False),
    }
    assert "share of its pairs" in found.sentence()
    scored = {**rows[0], "chosen_rewards": {"total": 4.0, "ocr": 1.0}, "rejected_rewards": {"total": 3.0, "ocr": 0.5}}
    found = load_samples(lines(folder / "p.jsonl", [scored]))
    assert [(s.reward, dict(s.rewards), s.label) for s in found.rows] == [
        (4.0, {"ocr": 1.0}, True),
        (3.0, {"ocr": 0.5}, False),
    ]
    assert "share" not in found.sentence()


def test_samples_without_a_reward_are_left_out_where_others_have_one_and_count_1_where_none_has(folder: Path) -> None:
    rows = [{"prompt": "a", "image": "0.png"}, {"prompt": "a", "image": "1.png", "reward": 0.3}]
    found = load_samples(lines(folder / "s.jsonl", rows))
    assert [s.reward for s in found.rows] == [0.3] and dict(found.left_out) == {"without a label": 1}
    found = load_samples(lines(folder / "s.jsonl", [rows[0], {"prompt": "b", "image": "1.png"}]))
    assert [s.reward for s in found.rows] == [1.0, 1.0]
    assert "every sample counts 1" in found.sentence()


def test_a_sample_of_several_rows_has_the_mean_of_the_rewards_that_there_are(folder: Path) -> None:
    row = {"prompt": "a", "image": "0.png"}
    rows = [{**row, "label": True}, {**row, "reward": 0.25}, {**row, "reward": 0.75}]
    (found,) = load_samples(lines(folder / "s.jsonl", rows)).rows
    assert (found.reward, found.label) == (0.5, True)


def test_a_prompts_own_picture_stays_with_the_prompt(folder: Path) -> None:
    rows = [{"prompt": "a", "sample": "0.png", "image": "3.png", "reward": 1.0}]
    (found,) = load_samples(lines(folder / "s.jsonl", rows)).rows
    assert Path(str(found.medium)).name == "0.png" and found.prompt.columns["image"].name == "3.png"


# published formats


def pickapic(path: Path, rows: Sequence[Mapping[str, Any]], group: int = 2) -> Path:
    base = {"has_label": True, "image_0_uid": "x", "image_1_uid": "y"}
    parquet.write_table(pyarrow.Table.from_pylist([{**base, **row} for row in rows]), path, row_group_size=group)
    return path


def test_pickapic_keeps_the_bytes_in_the_table_until_they_are_asked_for(tmp_path: Path) -> None:
    dark, light = encoded(0), encoded(255)
    row = {"caption": "a", "jpg_0": dark, "jpg_1": light}
    rows = [
        {**row, "label_0": 1.0, "label_1": 0.0},
        {**row, "label_0": 0.0, "label_1": 1.0},
        {**row, "label_0": 0.5, "label_1": 0.5},
        {**row, "label_0": 0.0, "label_1": 1.0, "has_label": False},
        {**row, "label_0": 0.0, "label_1": 1.0, "image_1_uid": "x"},
        {**row, "label_0": 0.0, "label_1": 1.0, "jpg_1": None},
    ]
    found = load_pairs(pickapic(tmp_path / "0.parquet", rows))
    first, second = found.rows
    assert isinstance(first.chosen, Embedded)
    assert (first.chosen.read(), first.rejected.read()) == (dark, light)
    assert (second.chosen.read(), second.rejected.read()) == (light, dark)
    assert float(read_image(second.chosen).mean()) == 1.0
    assert dict(found.left_out) == {
        "ties": 1,
        "without a label": 1,
        "with the same picture on both sides": 1,
        "with a side missing": 1,
    }


def test_pickapic_does_not_read_the_pictures_to_list_the_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pickapic(
        tmp_path / "0.parquet",
        [{"caption": "a", "jpg_0": encoded(i), "jpg_1": encoded(99), "label_0": 1.0, "label_1": 0.0} for i in range(5)],
    )
    read: list[str] = []
    own = parquet.ParquetFile.read_row_group

    def noted(self: Any, group: int, columns: Any = None, **rest: Any) -> Any:
        read.extend(columns)
        return own(self, group, columns=columns, **rest)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", noted)
    assert len(load_pairs(path).rows) == 5
    assert read and not {"jpg_0", "jpg_1"} & set(read)


def test_a_folder_of_parquet_files_is_one_data_set(tmp_path: Path) -> None:
    row = {"caption": "a", "jpg_0": encoded(0), "jpg_1": encoded(255), "label_0": 1.0, "label_1": 0.0}
    for i in range(2):
        pickapic(tmp_path / f"{i}.parquet", [row])
    assert len(load_pairs(tmp_path).rows) == 2
    pickapic(tmp_path / "train-00000-of-00001.parquet", [row])
    assert len(load_pairs(tmp_path).rows) == 1  # the other splits are not trained on


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    row = {"caption": "a", "jpg_0": encoded(0), "jpg_1": encoded(255), "label_0": 1.0, "label_1": 0.0}
    path = pickapic(tmp_path / "0.parquet", [row])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="truncated or damaged"):
        load_pairs(path)


def test_hpdv2_training_pairs_and_test_ranks(folder: Path) -> None:
    rows = [
        {"prompt": "a", "file_path": ["0.png", "1.png"], "human_preference": [0, 1]},
        {"prompt": "b", "file_path": ["0.png", "1.png"], "human_preference": [1, 0]},
    ]
    path = folder / "train.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert names(path) == [("a", "1.png", "0.png"), ("b", "0.png", "1.png")]
    ranked = {"prompt": "a", "image_path": ["0.png", "1.png", "2.png"], "rank": [2, 1, 2], "raw_annotations": []}
    path.write_text(json.dumps([ranked]), encoding="utf-8")
    assert names(path) == [("a", "1.png", "0.png"), ("a", "1.png", "2.png")]
    assert dict(load_pairs(path).left_out) == {"ties": 1}


def test_hpdv3_prefers_path1_unless_the_votes_are_even(folder: Path) -> None:
    base = {"prompt": "a", "path1": "2.png", "path2": "1.png", "confidence": 0.9}
    path = folder / "train.json"
    path.write_text(json.dumps([{**base, "choice_dist": [8, 2]}, {**base, "choice_dist": [5, 5]}]), encoding="utf-8")
    assert names(path) == [("a", "2.png", "1.png")]


def test_imagerewarddb_pairs_pictures_of_a_prompt_by_rank_and_keeps_the_ratings(folder: Path) -> None:
    rows = [
        {"prompt": "a", "prompt_id": "1-1", "image_path": f"{i}.png", "rank": r, "overall_rating": 7 - r}
        for i, r in enumerate([3, 1, 2])
    ]
    path = folder / "metadata.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert names(path) == [("a", "1.png", "0.png"), ("a", "2.png", "0.png"), ("a", "1.png", "2.png")]
    best = max(load_samples(path).rows, key=lambda s: s.reward)
    assert Path(str(best.medium)).name == "1.png" and dict(best.rewards) == {"overall_rating": 6.0}


VIDEOS = "path_A,path_B,prompt,VQ,MQ,TA,fps_A,num_frames_A\n"


@pytest.mark.parametrize(
    ("dimension", "chosen"),
    [(None, "A"), ("VQ", "A"), ("MQ", "B"), ("TA", None), ({"VQ": 1.0, "MQ": 3.0}, "B"), ({"VQ": 1, "MQ": 1}, None)],
)
def test_videogen_rewardbench_by_one_dimension_or_a_vote(folder: Path, dimension: Any, chosen: str | None) -> None:
    for side in "AB":
        (folder / f"{side}.mp4").write_bytes(side.encode())
    path = folder / "bench.csv"
    path.write_text(f"{VIDEOS}A.mp4,B.mp4,a,A,B,same,8,16\nB.mp4,A.mp4,b,A,same,A,8,16\n", encoding="utf-8")
    found = [row for row in load_pairs(path, dimension=dimension).rows if str(row.prompt) == "a"]
    if dimension is None:
        assert not found  # one each, one the same: an even vote is a tie
    else:
        assert [Path(str(row.chosen)).stem for row in found] == ([] if chosen is None else [chosen])
    assert all(row.kind == "video" for row in found)


def test_an_overall_label_wins_over_the_vote_and_an_unknown_dimension_names_those_there_are(folder: Path) -> None:
    for side in "AB":
        (folder / f"{side}.mp4").write_bytes(side.encode())
    path = folder / "bench.csv"
    path.write_text("path_A,path_B,prompt,VQ,Overall\nA.mp4,B.mp4,a,A,B\n", encoding="utf-8")
    assert names(path) == [("a", "B.mp4", "A.mp4")]
    with pytest.raises(RecipeError, match="bench.csv has VQ, Overall"):
        load_pairs(path, dimension="TA")
    with pytest.raises(RecipeError, match="hpdv3 has one label per pair"):
        load_pairs(path, format="hpdv3", dimension="TA")


def test_trl_rows_in_every_form(folder: Path) -> None:
    def said(name: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": [{"type": "image", "image": name}]}]

    talk = [{"role": "user", "content": [{"type": "text", "text": "a cat"}]}]
    path = lines(folder / "t.jsonl", [{"prompt": talk, "chosen": said("0.png"), "rejected": said("1.png")}])
    assert detect(path) == "trl"
    assert names(path) == [("a cat", "0.png", "1.png")]
    path = lines(folder / "t.jsonl", [{"prompt": "a", "chosen": {"path": "0.png"}, "rejected": {"path": "1.png"}}])
    assert names(path) == [("a", "0.png", "1.png")]
    unpaired = [{"prompt": "a", "completion": f"{i}.png", "label": bool(i)} for i in (0, 1)]
    path = lines(folder / "t.jsonl", unpaired)
    assert [(s.label, s.reward) for s in load_samples(path).rows] == [(False, None), (True, None)]
    path = lines(folder / "t.jsonl", [{"prompt": "a", "chosen": {"bytes": "..."}, "rejected": {"path": "1.png"}}])
    with pytest.raises(DataError, match="picture without a path"):
        load_pairs(path)
    path = lines(folder / "t.jsonl", [{"prompt": "a", "chosen": "Sure,\nhere it is", "rejected": "No"}])
    with pytest.raises(DataError, match="text preferences cannot train"):
        load_pairs(path, format="trl")


def test_folders_of_pairs(tmp_path: Path) -> None:
    for side, value in (("chosen", 200), ("rejected", 10)):
        (tmp_path / side).mkdir()
        (tmp_path / side / "a.png").write_bytes(encoded(value, "PNG"))
    (tmp_path / "chosen" / "b.png").write_bytes(encoded(1, "PNG"))
    (tmp_path / "prompts").mkdir()
    for name in "ab":
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"prompt {name}\n", encoding="utf-8")
    found = load_pairs(tmp_path)
    (pair,) = found.rows
    assert str(pair.prompt) == "prompt a" and Path(str(pair.chosen)).parent.name == "chosen"
    assert dict(found.left_out) == {"with a side missing": 1}
    (tmp_path / "prompts" / "a.txt").unlink()
    with pytest.raises(DataError, match="no prompt for 'a'"):
        load_pairs(tmp_path)


# what cannot be read


def test_unknown_columns_say_what_was_found_and_what_is_known(folder: Path) -> None:
    path = lines(folder / "x.jsonl", [{"prompt": "a", "winner": "0.png"}])
    with pytest.raises(DataError) as refused:
        load_pairs(path)
    assert "prompt, winner" in str(refused.value) and all(name in str(refused.value) for name in FORMATS)


def test_a_file_without_one_usable_pair_is_refused_with_the_reasons(folder: Path) -> None:
    path = lines(folder / "x.jsonl", [{"prompt": "a", "chosen": "0.png", "rejected": "copy.png"}])
    with pytest.raises(DataError, match="1 with the same picture on both sides"):
        load_pairs(path)


def test_an_unknown_format_and_a_missing_file_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match="there is no preference file"):
        load_pairs(folder / "gone.jsonl")
    with pytest.raises(RecipeError, match="format='pikapic'; known: pickapic"):
        load_pairs(lines(folder / "x.jsonl", []), format="pikapic")


def test_damaged_media_are_named_when_they_are_read(tmp_path: Path) -> None:
    row = {"caption": "a", "jpg_0": b"\xff\xd8\xffnothing", "jpg_1": encoded(255), "label_0": 1.0, "label_1": 0.0}
    (pair,) = load_pairs(pickapic(tmp_path / "0.parquet", [row])).rows
    with pytest.raises(DataError, match="column 'jpg_0', row 0"):
        read_image(pair.chosen)
    (tmp_path / "v.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"v\.mp4 cannot be read as a video"):
        read_video(tmp_path / "v.mp4")


def test_a_folder_of_frames_is_a_video_and_is_thinned_evenly(folder: Path) -> None:
    (folder / "clip").mkdir()
    for k in range(5):
        (folder / "clip" / f"{k:03d}.png").write_bytes(encoded(50 * k, "PNG"))
    path = lines(folder / "s.jsonl", [{"prompt": "a", "video": "clip", "reward": 1.0}])
    (found,) = load_samples(path).rows
    assert found.kind == "video"
    frames = read_video(Path(str(found.medium)), frames=3)
    torch.testing.assert_close(frames.mean(dim=(1, 2, 3)) * 255, torch.tensor([0.0, 100.0, 200.0]))


# conversion


def test_converted_data_stand_alone_with_the_same_bytes(tmp_path: Path) -> None:
    dark, light = encoded(0), encoded(255)
    row = {"caption": "a", "jpg_0": dark, "jpg_1": light, "label_0": 0.0, "label_1": 1.0}
    found = load_pairs(pickapic(tmp_path / "0.parquet", [row, {**row, "caption": "b"}]))
    file = write_rows(found, tmp_path / "out")
    again = load_pairs(file)
    assert [str(row.prompt) for row in again.rows] == ["a", "b"]
    assert [Path(str(again.rows[0].chosen)).read_bytes(), Path(str(again.rows[0].rejected)).read_bytes()] == [
        light,
        dark,
    ]
    with pytest.raises(DataError, match="is there already"):
        write_rows(found, tmp_path / "out")


def test_converted_inputs_of_one_name_stay_apart(folder: Path, tmp_path: Path) -> None:
    for i, place in enumerate(("image", "mask", "x", "y")):
        (folder / place).mkdir()
        (folder / place / "1.png").write_bytes(encoded(50 * i + 7, "PNG"))
    columns = {"image": "image/1.png", "mask": "mask/1.png", "images": ["x/1.png", "y/1.png"]}
    row = {"prompt": "a", "chosen": "0.png", "rejected": "1.png", **columns}
    found = load_pairs(lines(folder / "p.jsonl", [row]))
    (after,) = load_pairs(write_rows(found, tmp_path / "new")).rows
    before = found.rows[0].prompt.columns
    assert after.prompt.columns["image"].read_bytes() == before["image"].read_bytes()
    assert after.prompt.columns["mask"].read_bytes() == before["mask"].read_bytes()
    assert [p.read_bytes() for p in after.prompt.columns["images"]] == [p.read_bytes() for p in before["images"]]
    assert len({p.read_bytes() for p in (tmp_path / "new" / "inputs").iterdir()}) == 4


def test_own_rows_survive_a_round_trip(folder: Path, tmp_path: Path) -> None:
    row = {
        "prompt": "a",
        "prompt_id": 9,
        "chosen": "0.png",
        "rejected": "1.png",
        "margin": 0.5,
        "weight": 3.0,
        "seed": 4,
    }
    before = load_pairs(lines(folder / "p.jsonl", [row]))
    (after,) = load_pairs(write_rows(before, tmp_path / "new")).rows
    assert (after.prompt, after.prompt.id, dict(after.prompt.columns)) == ("a", 9, {"seed": 4})
    assert (after.margin, after.weight, after.source) == (0.5, 3.0, "p.jsonl")
    samples = load_samples(lines(folder / "s.jsonl", [{"prompt": "a", "image": "0.png", "label": True}]))
    (sample,) = load_samples(write_rows(samples, tmp_path / "other")).rows
    assert sample.label is True and sample.reward is None


def test_data_are_not_converted_into_a_folder_that_has_preferences_or_is_being_sampled_into(
    folder: Path, tmp_path: Path
) -> None:
    found = load_pairs(lines(folder / "p.jsonl", [{"prompt": "a", "chosen": "0.png", "rejected": "1.png"}]))
    for i, name in enumerate(("pairs.jsonl", "samples.jsonl", "settings.json")):
        out = tmp_path / str(i)
        out.mkdir()
        (out / name).write_text("mine", encoding="utf-8")
        with pytest.raises(DataError, match=f"{name} is there already"):
            write_rows(found, out)
        assert [f.name for f in out.iterdir()] == [name] and (out / name).read_text() == "mine"


def test_rows_are_not_converted_into_the_folder_of_their_own_pictures(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": f"{i}.png", "rejected": f"{i + 1}.png"} for i in range(3)]
    out = tmp_path / "out"
    table = write_rows(load_pairs(lines(folder / "p.jsonl", rows)), out)
    held = {f.name: f.read_bytes() for f in (out / "media").iterdir()}
    table = table.rename(out / "good.jsonl")
    table.write_text(table.read_text().splitlines()[-1] + "\n", encoding="utf-8")
    for found in (load_pairs(table), load_samples(table)):
        with pytest.raises(DataError, match=r"row 1: copies into .* could replace"):
            write_rows(found, out)
    assert {f.name: f.read_bytes() for f in (out / "media").iterdir()} == held


def test_an_interrupted_conversion_of_videos_can_be_repeated(folder: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (folder / name).mkdir()
        (folder / name / "000.png").write_bytes(encoded(len(name), "PNG"))
    found = load_pairs(lines(folder / "p.jsonl", [{"prompt": "a", "chosen": "first", "rejected": "second"}]))
    write_rows(found, tmp_path / "out").unlink()
    (again,) = load_pairs(write_rows(found, tmp_path / "out")).rows
    assert (Path(str(again.chosen)) / "000.png").read_bytes() == encoded(5, "PNG")
