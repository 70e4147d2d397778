"""What a recipe needs from the hub is listed, and a hub that cannot be reached is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from alignkit.cli import main
from alignkit.errors import AlignkitError
from alignkit.training.fetch import fetch, needs_of_recipe
from alignkit.training.grpo import GRPO
from alignkit.training.planning import lines, plan
from tests.rewards.test_weights import HUB, SPEC


def recipe_with_remote_parts(recipe: GRPO) -> GRPO:
    return dataclasses.replace(recipe, rewards={f"{SPEC}(factor=2.0)": 1.0}, judges=("brightness",))


def test_needs_are_the_model_and_every_reward_with_weights(tiny_recipe: GRPO) -> None:
    needs = needs_of_recipe(recipe_with_remote_parts(tiny_recipe))
    assert [(need.what, need.files.source, need.place is None) for need in needs] == [
        ("model", tiny_recipe.model, False),
        ("remote", HUB, True),
    ]


def test_fetching_without_a_hub_names_what_is_missing(tiny_recipe: GRPO) -> None:
    said: list[str] = []
    with pytest.raises(AlignkitError, match=HUB):
        list(fetch(needs_of_recipe(recipe_with_remote_parts(tiny_recipe)), said.append))
    assert said == [f"downloading {HUB} for remote"]


def test_a_pipeline_that_is_nowhere_is_named(tiny_recipe: GRPO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    remote = dataclasses.replace(tiny_recipe, model="nobody/such-a-pipeline", rewards={"brightness": 1.0}, judges=())
    (need,) = needs_of_recipe(remote)
    assert need.place is None
    with pytest.raises(AlignkitError, match="nobody/such-a-pipeline"):
        list(fetch([need], lambda _: None))


def test_the_command_lists_a_shipped_recipe_and_a_reward(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "quickstart", "--list"]) == 0
    assert "model" in capsys.readouterr().out
    assert main(["fetch", f"{SPEC}", "--list"]) == 0
    shown = capsys.readouterr().out
    assert HUB in shown and "not here" in shown


def test_a_name_that_is_neither_recipe_nor_reward_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "quickstrat"]) != 0
    assert "neither a recipe" in capsys.readouterr().err


def test_the_plan_names_rewards_their_cost_and_what_is_not_here(tiny_recipe: GRPO) -> None:
    record = plan(recipe_with_remote_parts(tiny_recipe))
    shown = dict(lines(record))
    assert f"not here: {HUB} (alignkit fetch)" in shown["reward x 1: remote"]
    assert shown["judge: brightness"]


def test_fetch_needs_nothing_where_everything_is_on_disk(tiny_recipe: GRPO, tmp_path: Path) -> None:
    said: list[str] = []
    needs = needs_of_recipe(dataclasses.replace(tiny_recipe, rewards={"brightness": 1.0}, judges=()))
    assert list(fetch(needs, said.append)) == needs and said == []


def test_the_features_that_tell_samples_apart_are_fetched_too(tiny_recipe: GRPO) -> None:
    own = dataclasses.replace(tiny_recipe, rewards={"brightness": 1.0}, judges=(), diversity_shaping="dino_similarity")
    assert [need.files.source for need in needs_of_recipe(own)][1:] == ["facebook/dinov2-base"]
