"""The recipes of real models: what they say holds together, and their code path runs on tiny random weights."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from alignkit import load_prompts, shipped
from alignkit.cli import main
from alignkit.rewards.composition import GenEval
from alignkit.rewards.text import parts_of
from alignkit.training import planning
from alignkit.training.recipe import Recipe
from alignkit.training.recipe_files import Source, load

FILES = {
    file.stem: file
    for model in ("sd35", "flux", "qwen", "sdxl", "wan", "ltx", "hunyuan", "cogvideox")
    for file in sorted(shipped.path("recipes").glob(f"{model}_*.py"))
}
WANTED = {
    "sd35_ocr", "sd35_pickscore", "sd35_geneval", "flux_hps", "flux_pref_grpo", "qwen_self_reward", "sdxl_dpo",
    "wan_grpo", "wan_dpo", "wan_rwr", "wan_instruct", "ltx_grpo", "ltx_dpo", "ltx_rwr", "hunyuan_grpo", "hunyuan_dpo",
    "cogvideox_grpo", "cogvideox_dpo",
}  # fmt: skip
VARIANTS = [
    (stem, node.name)
    for stem, file in FILES.items()
    for node in ast.parse(file.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef)
]
FAST = {"sdxl_dpo:lora"}
BLIND = {"sd35_geneval:nft"}  # a random detector finds nothing in any sample, and nothing else is in this loss
PROMPTS = sorted(file for file in shipped.path("recipes", "prompts").iterdir() if file.suffix != ".md")


def loaded(stem: str, function: str = "recipe") -> Recipe:
    recipe = load(Source(FILES[stem], function))
    assert isinstance(recipe, Recipe)
    return recipe


def test_every_real_model_of_the_plan_has_its_recipe() -> None:
    assert set(FILES) >= WANTED


@pytest.mark.parametrize("stem, function", VARIANTS)
def test_a_recipe_contradicts_nothing_and_names_a_model_that_can_be_planned(stem: str, function: str) -> None:
    recipe = loaded(stem, function)
    recipe.validate()
    models = {json.loads(f.read_text())["hub_id"] for f in shipped.path("recipes", "configs").glob("*.json")}
    assert recipe.model in models
    assert recipe.judges, "something that is not trained on has to be measured"


@pytest.mark.parametrize("stem", FILES)
def test_a_docstring_says_command_hardware_sources_and_that_it_was_not_run(stem: str) -> None:
    text = ast.get_docstring(ast.parse(FILES[stem].read_text(encoding="utf-8"))) or ""
    assert f"alignkit run {stem}" in text
    for part in ("Hardware:", "Sources:", "not yet run at full size", "arXiv"):
        assert part in text, part
    named = {function for other, function in VARIANTS if other == stem} - {"recipe"}
    assert all(f"alignkit run {stem}:{function}" in text for function in named)


@pytest.mark.parametrize("stem", [pytest.param(s, marks=() if s == "wan_grpo" else pytest.mark.slow) for s in FILES])
def test_a_recipe_is_planned_without_weights(stem: str) -> None:
    record = planning.plan(loaded(stem))
    assert record["trainable"]["parameters"] > 10_000_000
    assert record["round"]["rows"]["total"] > 0 and record["memory_bytes"]["weights"] > 2**32
    assert not [reward for reward in record["rewards"] if reward["cannot_load"]]
    assert list(planning.lines(record))


def tiny_run(name: str, folder: Path) -> tuple[dict, list[dict]]:
    """Two rounds through the command line; fewer steps of the evaluations than the recipe's save most of the time."""
    short = ["--eval-steps", "2", "--updates", "1", "--diversity-prompts", "0"]
    if getattr(loaded(*name.split(":")), "min_margin", 0):  # of the real reward's scale; random ones hardly differ
        short += ["--min-margin", "0"]
    assert main(["run", name, "--tiny", "--out", str(folder / "run"), *short]) == 0
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "run" / "summary.json").read_text()), metrics


@pytest.mark.timeout(600)  # up to half a minute of one core
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(f"{stem}:{function}", marks=() if f"{stem}:{function}" in FAST else pytest.mark.slow)
        for stem, function in VARIANTS
    ],
)
def test_a_recipe_takes_two_rounds_on_a_tiny_model_of_its_class(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # what a recipe learns from lies under the folder that the command runs in
    summary, metrics = tiny_run(name, tmp_path)
    assert summary["steps"] == 2 and len(metrics) >= 2
    moved = any(round["policy/grad_norm"] > 0 for round in metrics if "policy/grad_norm" in round)
    alike = all(round["groups/zero_std_fraction"] == 1 for round in metrics if "groups/zero_std_fraction" in round)
    assert moved or (alike and name in BLIND)


# prompts


@pytest.mark.parametrize("file", PROMPTS, ids=lambda file: file.stem)
def test_prompts_are_different_and_none_is_both_trained_and_held_out(file: Path) -> None:
    prompts = [str(prompt) for prompt in load_prompts(file)]
    assert len(set(prompts)) == len(prompts) >= 12
    trained = file.with_name(file.name.replace("_held_out", ""))
    if trained != file:
        assert not set(prompts) & {str(prompt) for prompt in load_prompts(trained)}


def test_every_text_prompt_says_what_is_to_be_read_and_every_object_prompt_what_is_to_be_found() -> None:
    folder = shipped.path("recipes", "prompts")
    for name in ("text.txt", "text_held_out.txt"):
        assert all(parts_of(prompt) for prompt in load_prompts(folder / name))
    reward = GenEval(colours="nearest")
    for name in ("objects.jsonl", "objects_held_out.jsonl"):
        prompts = load_prompts(folder / name)
        reward.check_prompts(prompts)
        assert len({prompt.columns["tag"] for prompt in prompts}) == 6
