"""The same trainer on other families: DDPO on eps models, and a pipeline that edits images."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from alignkit.flow.transition import Noise
from alignkit.training.grpo import GRPO
from tests.policy.zoo import ZOO
from tests.training.test_grpo import make_run


def recipe_for(name: str, variant: str, tiny_recipe: GRPO, tmp_path: Path) -> GRPO:
    ZOO[name].build().save_pretrained(tmp_path / "model")
    shared = {**ZOO[name].call, **ZOO[name].variants[variant]}
    call = {k: v for k, v in shared.items() if k not in ("image", "negative_prompt")}
    return dataclasses.replace(tiny_recipe, model=str(tmp_path / "model"), call=call, updates=1)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_ddpo_takes_a_round_on_eps_models(name: str, tiny_recipe: GRPO, tmp_path: Path) -> None:
    recipe = recipe_for(name, "guided", tiny_recipe, tmp_path)
    run = make_run(dataclasses.replace(recipe, noise=Noise("ddim", 1.0), plan="full"), tmp_path / "run")
    metrics = run.round(0)
    assert metrics["policy/ratio_first_dev"] == 0.0
    assert math.isfinite(metrics["policy/loss"]) and metrics["policy/grad_norm"] > 0


def test_an_editing_pipeline_is_conditioned_on_the_image_column_of_the_prompt_file(
    tiny_recipe: GRPO, tmp_path: Path
) -> None:
    recipe = recipe_for("flux_kontext", next(iter(ZOO["flux_kontext"].variants)), tiny_recipe, tmp_path)
    rows = []
    for i in range(6):
        Image.new("RGB", (32, 32), (40 * i, 20, 90)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"prompt": f"make it red {i}", "image": f"{i}.png"}))
    (tmp_path / "edits.jsonl").write_text("\n".join(rows))
    run = make_run(dataclasses.replace(recipe, prompts=str(tmp_path / "edits.jsonl")), tmp_path / "run")
    metrics = run.round(0)
    assert metrics["policy/ratio_first_dev"] == 0.0
    assert math.isfinite(metrics["policy/loss"]) and metrics["policy/grad_norm"] > 0
