"""Methods compared: shared noise, paired measures, runs that go on where they stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from alignkit.data.prompts import load_prompts
from alignkit.errors import RecipeError
from alignkit.inference import comparison
from alignkit.inference.comparison import Arm, Comparison
from alignkit.inference.comparison_report import picture, table, write
from alignkit.training import planning
from alignkit.training.recipe_files import reload
from alignkit.training.run import resume, start
from tests.policy.zoo import ZOO

CALL = {"height": 32, "width": 32, "max_sequence_length": 8, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("comparison")
    ZOO["sd3"].build().save_pretrained(place / "model")
    (place / "prompts.txt").write_text("a red cat\na blue dog\na green bird\n", encoding="utf-8")
    return place


@pytest.fixture
def recipe(folder: Path) -> Comparison:
    return Comparison(
        model=str(folder / "model"),
        prompts=str(folder / "prompts.txt"),
        rewards={"brightness": 1.0},
        judges=("jpeg_compressibility",),
        arms={
            "unguided": Arm(),
            "same again": Arm("best_of_n"),
            "best of 4": Arm("best_of_n", budget=4.0),
            "darkest of 4": Arm("best_of_n", {"brightness": -1.0}, budget=4.0),
            "longer": Arm(num_steps=4),
        },
        call=CALL,
        num_steps=2,
        seeds=(0, 1),
        frontier=("brightness", "jpeg_compressibility"),
    )


def test_the_summary_says_what_every_arm_reached_and_cost(recipe: Comparison, tmp_path: Path) -> None:
    start(recipe, tmp_path / "run")
    arms = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["arms"]
    mean = {name: arm["measures"]["brightness"] for name, arm in arms.items()}
    assert mean["darkest of 4"] < mean["unguided"] == mean["same again"] < mean["best of 4"]
    assert [arms[name]["calls"] for name in recipe.arms] == [1, 1, 4, 4, 2]
    assert arms["unguided"]["against_first"] == {}
    same, better = (arms[name]["against_first"]["brightness"] for name in ("same again", "best of 4"))
    assert same == {"mean": 0.0, "low": 0.0, "high": 0.0, "error": 0.0} and 0 <= better["low"] <= better["mean"]
    assert better["mean"] == pytest.approx(mean["best of 4"] - mean["unguided"])
    assert arms["unguided"]["diversity"] > 0
    for name in ("table.md", "comparison.png", "samples.png", "report.html", "recipe.json", "env.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    table = (tmp_path / "run" / "table.md").read_text(encoding="utf-8")
    assert "| best of 4 | 4.00 |" in table and "brightness" in table


def test_a_stopped_comparison_draws_only_what_is_missing(
    recipe: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(recipe, tmp_path / "run")
    whole = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    (tmp_path / "run" / "summary.json").unlink()
    lost = tmp_path / "run" / "arms" / "best-of-4-seed1.safetensors"
    lost.unlink()
    drawn: list[int] = []
    own = comparison.sampled

    def counted(*args: object) -> object:
        drawn.append(1)
        return own(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(comparison, "sampled", counted)
    resume(tmp_path / "run")
    again = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert len(drawn) == 1 and lost.is_file()
    assert {n: a["measures"] for n, a in again["arms"].items()} == {n: a["measures"] for n, a in whole["arms"].items()}


def test_a_recipe_written_down_is_the_same_recipe(recipe: Comparison, tmp_path: Path) -> None:
    short = replace(recipe, limit=2, seeds=(0,))
    start(short, tmp_path / "run")
    assert reload(tmp_path / "run")[0] == short
    assert (tmp_path / "run" / "samples.png").is_file()


def test_sums_of_all_arms_are_planned(recipe: Comparison) -> None:
    record = planning.plan(recipe)
    assert record["samples"] == 3 * 2 * 5 and record["arms"]["best of 4"]["denoiser"] == 4 * 2 * 6
    said = dict(planning.lines(record))
    assert said["  best of 4"] == "denoiser 48, decodes 24, rewards 24"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": {"unguided": Arm()}}, "at least two arms"),
        ({"seeds": ()}, "one seed"),
        ({"seeds": (1, 1)}, "holds one twice"),
        ({"arms": {"a": Arm(), "b": Arm("best_of_m")}}, "nearest: 'best_of_n'"),
        ({"arms": {"a": Arm(), "b": Arm(budget=0.5)}}, "below 1"),
        ({"arms": {"w +1": Arm(), "w -1": Arm()}}, "must differ"),
        ({"limit": 1}, "at least 2"),
    ],
)
def test_what_cannot_be_compared_is_refused(recipe: Comparison, changes: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        start(replace(recipe, **changes), tmp_path / "run")


def test_exact_shares_count_full_marks(recipe: Comparison) -> None:
    parts = {"ocr": torch.tensor([[1.0, 0.5], [1.0, 1.0]])}
    drawn = comparison.Drawn(torch.zeros(2, 2, 3, 4, 4), parts, 1.0, {}, 0.0)
    found = comparison.per_prompt(replace(recipe, exact=("ocr",)), drawn)
    torch.testing.assert_close(found["ocr"], torch.tensor([1.0, 0.75]).double())
    torch.testing.assert_close(found["ocr_exact"], torch.tensor([1.0, 0.5]).double())


def test_a_score_that_is_not_there_is_neither_exact_nor_wrong(recipe: Comparison, tmp_path: Path) -> None:
    nan = float("nan")
    ours = {"ocr": torch.tensor([[1.0, nan, nan], [1.0, 1.0, nan]]), "rare": torch.tensor([[1.0, nan, nan]] * 2)}
    drawn = comparison.Drawn(torch.rand(2, 3, 3, 4, 4), ours, 1.0, {"head": 0.0}, 0.1)
    short = replace(recipe, exact=("ocr",), arms={"a": Arm(), "<b>": Arm()})
    assert comparison.per_prompt(short, drawn)["ocr_exact"].nan_to_num(nan=-1.0).tolist() == [1.0, 1.0, -1.0]
    record = comparison.summary(short, {"a": drawn, "<b>": drawn}, load_prompts(recipe.prompts))
    assert set(record["arms"]["<b>"]["against_first"]) == {"ocr", "ocr_exact"}
    picture(record, ("ocr", "rare"), None, tmp_path / "picture.png")
    assert "| <b> |" in table(record)
    (tmp_path / "summary.json").write_text(json.dumps(record), encoding="utf-8")
    page = write(tmp_path).read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page and "<b>" not in page


def test_names_with_signs_of_mathematics_and_tables_are_shown_as_they_are(recipe: Comparison, tmp_path: Path) -> None:
    drawn = comparison.Drawn(torch.rand(1, 3, 3, 4, 4), {"$r$": torch.rand(1, 3)}, 1.0, {"head": 0.0}, 0.1)
    odd = replace(recipe, exact=("orc",), seeds=(0,), arms={"a": Arm(), r"$\x$ | b": Arm()})
    record = comparison.summary(odd, dict.fromkeys(odd.arms, drawn), load_prompts(recipe.prompts))
    picture(record, (), ("$r$", "$r$"), tmp_path / "picture.png")
    assert r"| $\x$ \| b |" in table(record) and set(record["arms"]["a"]["measures"]) == {"$r$"}


def test_prompts_of_the_file_are_cut_to_the_limit(recipe: Comparison, folder: Path) -> None:
    assert len(load_prompts(folder / "prompts.txt")) == 3
    assert planning.plan(replace(recipe, limit=2))["prompts"] == 2


def test_methods_are_compared_on_a_video_pipeline(folder: Path, tmp_path: Path) -> None:
    ZOO["ltx_t2v"].build().save_pretrained(tmp_path / "model")
    recipe = Comparison(
        model=str(tmp_path / "model"),
        prompts=str(folder / "prompts.txt"),
        rewards={"frame_difference": 1.0},
        arms={"unguided": Arm(), "best of 3": Arm("best_of_n", budget=3.0)},
        call={**CALL, "num_frames": 5},
        num_steps=2,
        seeds=(0, 1),
        limit=2,
    )
    start(recipe, tmp_path / "run")
    arms = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["arms"]
    plain, best = (arms[name]["measures"]["frame_difference"] for name in recipe.arms)
    assert best > plain and arms["unguided"]["diversity"] > 0
    with Image.open(tmp_path / "run" / "samples.png") as sheet:  # two strips of some frames, each at least 64 pixels
        assert sheet.width > 2 * 3 * 64 and sheet.height > 2 * 64
    assert (tmp_path / "run" / "report.html").is_file()
