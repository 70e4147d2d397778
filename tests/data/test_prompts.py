from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from alignkit.data import batches_of_equal_shape, load_prompts, split
from alignkit.errors import DataError, RecipeError
from alignkit.types import Prompt


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "pictures" / "one.png"
    path.parent.mkdir()
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(folder: Path, suffix: str, rows: list[dict]) -> Path:
    """The same rows as .jsonl, .csv (nested values as JSON) or .parquet."""
    path = folder / f"prompts{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == ".csv":
        import csv

        names = list(dict.fromkeys(name for row in rows for name in row))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            nested = [{n: json.dumps(v) if isinstance(v, list) else v for n, v in row.items()} for row in rows]
            writer.writerows(nested)
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
        from pyarrow import parquet

        names = dict.fromkeys(name for row in rows for name in row)
        parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), path)
    return path


def test_a_text_file_has_one_prompt_a_line_and_ids_are_line_numbers(tmp_path: Path) -> None:
    path = written(tmp_path, "p.txt", "\ufeffa cat\r\n\r\n  a dog \nüben 🙂 \u202eשלום\n")
    prompts = load_prompts(path)
    assert prompts == ["a cat", "a dog", "üben 🙂 \u202eשלום"]
    assert [prompt.id for prompt in prompts] == [1, 3, 4]
    assert all(not prompt.columns for prompt in prompts)


def test_separators_that_may_stand_inside_a_prompt_do_not_split_it(tmp_path: Path) -> None:
    assert load_prompts(written(tmp_path, "p.txt", "one\u2028still one\x0cone\ntwo")) == [
        "one\u2028still one\x0cone",
        "two",
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_table_gives_the_same_prompts(suffix: str, tmp_path: Path, picture: Path) -> None:
    rows = [
        {"prompt": "a cat, sitting", "negative_prompt": "blurry", "image": "pictures/one.png", "seed": 7,
         "height": 32, "width": 64, "num_frames": 5, "boxes": [[0, 0, 4, 4]], "style": "oil"},
        {"prompt": "a dog", "images": ["pictures/one.png", "pictures/one.png"]},
    ]  # fmt: skip
    one, two = load_prompts(table(tmp_path, suffix, rows))
    assert (str(one), one.id) == ("a cat, sitting", 1)
    assert dict(one.columns) == {
        "negative_prompt": "blurry", "image": picture, "seed": 7, "height": 32, "width": 64, "num_frames": 5,
        "boxes": [[0, 0, 4, 4]], "style": "oil",
    }  # fmt: skip
    assert (str(two), two.id) == ("a dog", 2)
    assert dict(two.columns) == {"images": [picture, picture]}


def test_boxes_may_name_what_is_in_them_and_references_are_files_of_the_folder(tmp_path: Path, picture: Path) -> None:
    boxes = [{"label": "cup", "box": [0, 0, 0.5, 1]}]
    row = {"prompt": "a cup", "boxes": boxes, "reference": "pictures/one.png"}
    (prompt,) = load_prompts(written(tmp_path, "p.jsonl", json.dumps(row)))
    assert dict(prompt.columns) == {"boxes": boxes, "reference": picture}
    outside = {**row, "reference": "../one.png"}
    with pytest.raises(DataError, match="reference"):
        load_prompts(written(tmp_path, "q.jsonl", json.dumps(outside)))


def test_a_limit_reads_only_the_first_prompts(tmp_path: Path) -> None:
    path = written(tmp_path, "p.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\nno json')
    assert load_prompts(path, limit=2) == ["a", "b"]
    with pytest.raises(RecipeError, match="limit=0"):
        load_prompts(path, limit=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "  "}', r"p\.jsonl, line 2: the prompt is empty"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"text": "b"}', r"line 3 has no column 'prompt'; columns found: text"),
        ("p.jsonl", '{"prompt": 5}', "column 'prompt' holds int 5"),
        ("p.jsonl", '{"prompt": "a"', "line 1 holds .*which is no JSON"),
        ("p.jsonl", '"just text"', "expected an object"),
        ("p.jsonl", '{"prompt": "a\\u0000b"}', "NUL"),
        ("p.jsonl", '{"prompt": "a", "height": "tall"}', "column 'height' holds 'tall'; expected a whole number"),
        ("p.jsonl", '{"prompt": "a", "height": 0}', "of at least 1"),
        ("p.jsonl", '{"prompt": "a", "num_frames": 1.5}', "column 'num_frames' holds 1.5"),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "column 'seed' holds True"),
        ("p.jsonl", '{"prompt": "a", "boxes": [[1, 2]]}', r"boxes \[left, top, right, bottom\]"),
        ("p.jsonl", '{"prompt": "a", "image": 3}', "expected the path of a file"),
        ("p.csv", "text,style\na,b\n", "no column 'prompt'; columns found: text, style"),
        ("p.csv", "prompt,style\na,b\n,c\n", r"p\.csv, row 2: the prompt is empty"),
        ("p.csv", "prompt,style\na,b,c\n", "row 1 has more cells than the header's 2"),
        ("p.csv", "prompt,prompt\na,b\n", "two columns have the same name"),
        ("p.csv", "prompt\n" + "x" * 200_000, "field larger than field limit"),
        ("p.csv", "", "no column 'prompt'; columns found: none"),
        ("p.csv", "prompt\n", "has no prompts; expected at least one row"),
        ("p.txt", "\n  \n", "has no prompts; expected at least one line"),
        ("p.txt", "good\na\0b", "line 2: the prompt contains a NUL"),
        ("p.txt", "a cat".encode("utf-16"), "not UTF-8"),
        ("p.txt", b"caf\xe9", "not UTF-8"),
        ("p.parquet", b"PAR1 and then nothing", "cannot be read as parquet, it is truncated or damaged"),
        ("p.xlsx", "a", r"unknown type '.xlsx'; expected one of .txt"),
    ],
)
def test_a_file_that_cannot_be_used_names_itself_the_place_and_the_reason(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        load_prompts(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no prompt file .*looked from"):
        load_prompts(tmp_path / "nothing.txt")


def test_a_parquet_column_of_the_wrong_type_names_file_and_column(tmp_path: Path) -> None:
    path = table(tmp_path, ".parquet", [{"prompt": 1}])
    with pytest.raises(DataError, match="column 'prompt' holds int 1"):
        load_prompts(path)


def test_a_very_long_prompt_is_kept_whole(tmp_path: Path) -> None:
    assert len(load_prompts(written(tmp_path, "p.txt", "x" * 100_000))[0]) == 100_000


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../secret.png", "may leave"),
        ("pictures/../../secret.png", "may leave"),
        ("..\\secret.png", "may leave"),
        ("{folder}/secret.png", "may leave"),
        ("link.png", "link out of"),
        ("linked/secret.png", "link out of"),
        ("https://example.org/a.png", "is no path"),
        ("nothing.png", "is not there"),
        ("a\0b.png", "is no path"),
    ],
)
@pytest.mark.parametrize("column", ["image", "images", "video", "mask"])
def test_paths_stay_inside_the_folder_of_the_file(column: str, path: str, message: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (4, 4)).save(secret)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path)
    row = {"prompt": "a", column: path.format(folder=tmp_path)}
    with pytest.raises(DataError, match=rf"p.jsonl, line 1, column '{column}': .*{message}"):
        load_prompts(written(folder, "p.jsonl", json.dumps(row)))


def test_a_folder_that_is_itself_reached_through_a_link_may_be_used(tmp_path: Path, picture: Path) -> None:
    os.symlink(tmp_path, tmp_path / "alias")
    written(tmp_path, "p.jsonl", '{"prompt": "a", "image": "pictures/one.png"}')
    assert load_prompts(tmp_path / "alias" / "p.jsonl")[0].columns["image"] == picture.resolve()


def test_a_split_is_seeded_and_loses_nothing() -> None:
    prompts = [Prompt(f"prompt {i}", id=i) for i in range(50)]
    train, held = split(prompts, held_out=0.2, seed=3)
    assert len(held) == 10 and sorted(p.id for p in train + held) == list(range(50))
    assert split(prompts, held_out=0.2, seed=3) == (train, held)
    assert split(prompts, held_out=0.2, seed=4) != (train, held)


def test_the_same_text_never_stands_on_both_sides_of_a_split() -> None:
    prompts = [Prompt(f"prompt {i % 10}", id=i) for i in range(100)]
    train, held = split(prompts, held_out=0.3)
    assert len(held) == 30 and not set(map(str, train)) & set(map(str, held))


@pytest.mark.parametrize(("texts", "share"), [(["a", "b"], 0.0), (["a", "b"], 1.0), (["a", "a"], 0.5)])
def test_a_split_that_leaves_one_side_empty_is_refused(texts: list[str], share: float) -> None:
    with pytest.raises(RecipeError):
        split([Prompt(text, id=i) for i, text in enumerate(texts)], held_out=share)


def test_batches_agree_in_shape_and_keep_every_prompt_in_order() -> None:
    wide, tall = {"height": 32, "width": 64}, {"height": 64, "width": 32}
    columns = [wide, {}, wide, tall, {}, wide, {**wide, "num_frames": 5}]
    prompts = [Prompt(str(i), id=i, columns=c) for i, c in enumerate(columns)]
    batches = [[prompt.id for prompt in batch] for batch in batches_of_equal_shape(prompts, 2)]
    assert batches == [[0, 2], [5], [1, 4], [3], [6]]
