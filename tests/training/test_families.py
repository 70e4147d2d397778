"""The same trainers on other families: eps and v models, Euler's scaled inputs, video, a pipeline that edits images."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from alignkit.flow.transition import Noise
from alignkit.training.grpo import GRPO
from alignkit.training.run import Run
from alignkit.training.run_dir import RunDir
from alignkit.training.signals import StopFlag
from tests.policy.zoo import ZOO
from tests.training.methods import recipe_of
from tests.training.test_grpo import make_run

VIDEOS = ("ltx_t2v", "wan_t2v", "hunyuan_video", "cogvideox_t2v")


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


@pytest.mark.parametrize("name", VIDEOS)
def test_the_ratio_is_1_before_the_first_update_on_videos(name: str, tiny_recipe: GRPO, tmp_path: Path) -> None:
    recipe = recipe_for(name, next(iter(ZOO[name].variants)), tiny_recipe, tmp_path)
    noise = Noise("ddim", 1.0) if name == "cogvideox_t2v" else Noise("flow_sde", 0.7)
    recipe = dataclasses.replace(recipe, noise=noise, plan="full", rewards={"frame_difference": 1.0})
    metrics = make_run(recipe, tmp_path / "run").round(0)
    assert metrics["policy/ratio_first_dev"] == 0.0
    assert math.isfinite(metrics["policy/loss"]) and metrics["policy/grad_norm"] > 0


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("DPO", "sdxl"), ("NFT", "sd15"), ("CRD", "cogvideox_t2v"), ("DGPO", "wan_t2v")),
        *((method, name) for method in ("DPO", "RWR", "SFT") for name in VIDEOS),
    ],
)
def test_methods_without_a_likelihood_take_a_round_on_eps_and_v_models_and_videos(
    method: str, name: str, tmp_path: Path
) -> None:
    ZOO[name].build().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("".join(f"a red cat {i}\n" for i in range(6)))
    reward = {"frame_difference": 1.0} if ZOO[name].video else {"brightness": 1.0}
    fields = {"call": dict(ZOO[name].call), "rewards": reward, "group_size": 2, "velocity_beta": 0.1}
    run = Run(recipe_of(method, tmp_path, **fields), RunDir.create(tmp_path / "run"), StopFlag())
    try:
        metrics = run.round(0)
    finally:
        run.policy.close()
    assert math.isfinite(metrics["policy/loss"]) and metrics["policy/grad_norm"] > 0
