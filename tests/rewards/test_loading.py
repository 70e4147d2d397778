from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch

from alignkit.errors import RecipeError
from alignkit.rewards import TABLE, describe, load, load_file, status
from alignkit.rewards.jpeg import JPEGCompressibility

SOURCE = '''
from dataclasses import dataclass


def redness(media, prompts):
    """Red."""
    return media[:, 0].mean(dim=(1, 2))


@dataclass
class Offset:
    by: float = 1.0
    name: str = "offset"
    kind: str = "image"
    differentiable: bool = True

    def __call__(self, media, prompts):
        return media.mean(dim=(1, 2, 3)) + self.by


ready = Offset(by=5.0)
'''


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_a_name_of_the_table_is_loaded_with_its_options() -> None:
    reward = load("jpeg_compressibility", quality=50)
    assert isinstance(reward, JPEGCompressibility) and reward.quality == 50


def test_every_name_of_the_table_points_to_something() -> None:
    for name, place in TABLE.items():
        module, _, attribute = place.partition(":")
        assert (Path(__file__).parents[2] / Path(*module.split("."))).with_suffix(".py").is_file(), name
        assert attribute


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no reward 'jpeg_compresibility'; did you mean 'jpeg_compressibility'"):
        load("jpeg_compresibility")


def test_an_unknown_option_is_refused_with_what_the_class_takes() -> None:
    with pytest.raises(RecipeError, match=r"qualty.*JPEGCompressibility\(quality: 'int' = 95\)"):
        load("jpeg_compressibility", qualty=50)


def test_a_module_and_a_name_are_loaded() -> None:
    assert load("alignkit.rewards.jpeg:JPEGCompressibility").name == "jpeg_compressibility"


def test_a_wrong_name_in_a_module_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'JPEGCompressibility'"):
        load("alignkit.rewards.jpeg:JpegCompressibility")


def test_a_module_that_is_not_installed_is_named() -> None:
    with pytest.raises(RecipeError, match="no_such_package_of_mine is missing"):
        load("no_such_package_of_mine.rewards:Best")


def test_a_function_of_a_file_is_a_reward(source: Path) -> None:
    media = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(load(f"{source}:redness")(media, ["a", "b"]), media[:, 0].mean(dim=(1, 2)))


def test_a_class_of_a_file_takes_options_and_an_object_of_a_file_is_used_as_it_is(source: Path) -> None:
    media = torch.zeros(1, 3, 4, 4)
    assert load(f"{source}:Offset", by=2.0)(media, ["a"]).item() == 2.0
    assert load(f"{source}:ready")(media, ["a"]).item() == 5.0


def test_objects_of_a_loaded_file_can_be_pickled(source: Path) -> None:
    assert pickle.loads(pickle.dumps(load(f"{source}:ready"))).by == 5.0


def test_a_file_is_run_once_and_again_when_it_changes(source: Path) -> None:
    first = load_file(source)
    assert load_file(source) is first
    source.write_text(SOURCE + "\nchanged = True\n")
    assert load_file(source) is not first


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("x = 1", "missing", "has no 'missing'"),
        ("raise OSError('disk')", "x", "fails while it runs: OSError: disk"),
        ("def (", "x", "fails while it runs: SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path: Path, content: str, name: str, message: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(content)
    with pytest.raises(RecipeError, match=message):
        load(f"{path}:{name}")


def test_a_file_that_is_not_there_or_lacks_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no file"):
        load(f"{tmp_path}/nothing.py:f")
    with pytest.raises(RecipeError, match=r"write rewards.py:name"):
        load("rewards.py")


def test_a_function_takes_no_options() -> None:
    with pytest.raises(RecipeError, match="takes no options, given scale"):
        load(lambda media, prompts: [0.0], scale=2)


def test_the_record_of_a_reward_in_a_file_has_the_hash_of_the_file(source: Path) -> None:
    for name in ("redness", "ready"):
        record = json.loads(json.dumps(describe(load(f"{source}:{name}"))))
        assert record["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
        assert record["spec"].startswith(f"{source}:")
        assert record["file"] == str(source)


def test_the_status_of_every_reward_is_ready_or_a_sentence() -> None:
    found = status()
    assert set(found) == set(TABLE)
    assert found["ocr"] == "ready" and all(found.values())
