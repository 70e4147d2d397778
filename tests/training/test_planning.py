"""Plans say what really happens: parameters, adapters, denoiser rows and latents agree with the built policy."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from alignkit.data.preferences import load_pairs
from alignkit.data.stored import read_video
from alignkit.errors import RecipeError
from alignkit.policy import Full, LoRA, Policy
from alignkit.training import measuring, planning, shrink
from alignkit.training.benchmark_methods import observed
from alignkit.training.blueprint import blueprint, build, class_named, configurations, count, latent_numel, on_meta
from alignkit.training.experience import join_scores
from alignkit.training.grpo import GRPO
from alignkit.training.learner import numbered
from alignkit.training.recipe import Recipe
from alignkit.training.run import Run
from alignkit.training.run_dir import RunDir
from alignkit.training.signals import StopFlag
from alignkit.training.tiny import small_config, tiny, write_model
from alignkit.training.tiny_data import write_data
from tests.policy.zoo import ZOO
from tests.training.methods import METHODS, recipe_of

CALL = {"height": 32, "width": 32, "guidance_scale": 1.0, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny SD 3 (`model`) and prompts."""
    folder = tmp_path_factory.mktemp("planning")
    ZOO["sd3"].build().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("".join(f"a red cat {i}\n" for i in range(12)), encoding="utf-8")
    return folder


def recipe(place: Path, **fields: Any) -> GRPO:
    own: dict[str, Any] = {
        "model": str(place / "model"),
        "prompts": str(place / "prompts.txt"),
        "rewards": {"brightness": 1.0},
        "call": CALL,
        "num_steps": 4,
        "prompts_per_step": 2,
        "group_size": 3,
        "train": LoRA(rank=2, alpha=4.0),
    }
    return GRPO(**{**own, **fields})


# without weights


def test_a_published_model_is_counted_by_its_hub_id_without_weights() -> None:
    fields: dict[str, Any] = {"prompts": "none.txt", "rewards": {"ocr": 1.0}, "precision": "bf16", "num_steps": 10}
    record = planning.plan(GRPO(model="black-forest-labs/FLUX.1-dev", **fields))
    assert record["parameters"]["transformer"] == 11_901_408_320
    assert record["configured_by"] == "recipes/configs/flux.1-dev.json"
    assert record["memory_bytes"]["weights"] == 2 * sum(record["parameters"].values())
    assert record["round"]["rows_per_sample"] == 1  # its guidance is an embedding
    assert record["trainable"]["endings"]["to_q"] == 19 + 38
    assert not record["weights_here"] and record["measured"] is None
    text = dict(planning.lines(record))
    assert text["memory: activations"] == "not measured" and text["seconds per round"].startswith("not measured")


@pytest.mark.parametrize("stem", ["sd-1.5", "sdxl", "wan2.1-t2v-1.3b", "ltx-video"])
def test_latents_have_the_published_number_of_elements(stem: str) -> None:
    record = configurations()[stem]
    found = blueprint(stem)
    only_vae = dataclasses.replace(found, components={"vae": found.components["vae"]})
    assert latent_numel(only_vae, record["sampling"]) == math.prod(record["latent_shape"])


def test_a_model_that_nothing_is_known_about_names_those_that_are() -> None:
    with pytest.raises(RecipeError, match=r"flux.1-dev \(black-forest-labs/FLUX.1-dev\)"):
        blueprint("nobody/nothing")


def test_a_plan_changes_no_file(place: Path) -> None:
    before = sorted((str(f), f.stat().st_mtime_ns) for f in place.rglob("*"))
    planning.plan(recipe(place))
    assert sorted((str(f), f.stat().st_mtime_ns) for f in place.rglob("*")) == before


# against the real thing


@pytest.mark.parametrize(
    "train", [LoRA(rank=3, alpha=3.0), LoRA(rank=2, targets="all"), LoRA(4, targets=("to_q",)), Full()]
)
def test_trainable_parameters_are_those_that_the_optimizer_gets(place: Path, train: LoRA | Full) -> None:
    found = planning.plan(recipe(place, train=train))["trainable"]
    with Policy(ZOO["sd3"].build(), train=train) as policy:
        assert found["parameters"] == sum(p.numel() for p in policy.parameters())
        if isinstance(train, LoRA):
            assert sum(found["layers"].values()) == len(policy.parameters()) // 2 == sum(found["endings"].values())


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 1), (4.0, 2)])
def test_rows_per_sample_by_rule_are_those_that_are_counted(place: Path, scale: float, rows: int) -> None:
    call = {**CALL, "guidance_scale": scale}
    assert planning.plan(recipe(place, call=call))["round"]["rows_per_sample"] == rows
    with Policy(ZOO["sd3"].build()) as policy:
        assert policy.driver.rows_per_sample(policy.condition(["a cat"], num_steps=2, **call)) == rows


def test_latents_have_as_many_elements_as_the_pipelines_own(place: Path) -> None:
    found = planning.plan(recipe(place))["latent_elements_per_sample"]
    with Policy(ZOO["sd3"].build()) as policy:
        cond = policy.condition(["a cat"], num_steps=2, **CALL)
        assert found == policy.initial_latents(cond, torch.Generator().manual_seed(0)).numel()


@pytest.mark.parametrize("method", METHODS)
def test_denoiser_rows_are_those_that_a_round_really_computes(method: str, place: Path, tmp_path: Path) -> None:
    own = recipe_of(method, place)
    planned = planning.plan(own)["round"]
    run = Run(own, RunDir.create(tmp_path / "run"), StopFlag())
    denoiser = run.policy.pipe.transformer
    run.gather.conditions(run.prompts[:2])  # the first call of a kind learns how the pipeline loops
    try:
        with observed(run.policy, denoiser) as sampling:
            experiences = run.collect(0)
        scores = join_scores([e.scores for e in experiences])
        groups = numbered([e.groups for e in experiences])
        weights, live = own.weigh(scores, run.rewards.weights, groups)
        with observed(run.policy, denoiser) as learned:
            run.learner.learn(0, experiences, weights, live, lambda: None)
        assert own.group_size == 4 and live.any()
    finally:
        run.policy.close()
    rows, learning = planned["rows"], learned.rows
    assert sampling.rows.total() == rows["sampling"]
    compared = learning["old" if own.reference == "old" else "reference"]
    assert learning["training"] == rows["training"] + rows["data"]
    if own.reference == "old":
        assert compared == rows["reference"] + rows["old"]
    else:
        assert (compared, learning["old"]) == (rows["reference"], rows["old"])
    assert learning["current"] == rows["editing"]
    assert rows["total"] == sum(n for role, n in rows.items() if role != "total")


def test_a_window_and_two_rows_of_guidance_are_in_the_counted_rows(place: Path) -> None:
    window = planning.plan(recipe(place, plan="window", window=2))["round"]
    assert window["rows"]["training"] == 6 * 2 and len(window["stochastic"]) == 2
    call = {**CALL, "guidance_scale": 4.0}
    assert planning.plan(recipe(place, call=call))["round"]["rows"]["sampling"] == 2 * 6 * 4
    assert planning.plan(recipe_of("RWR", place, call=call))["round"]["rows"]["sampling"] == 8 * 4  # unguided


def test_what_is_drawn_from_a_file_is_not_sampled(place: Path, tmp_path: Path) -> None:
    own = recipe_of("DPO", place, prompts=None, data="pairs.jsonl", group_size=1)
    record = planning.plan(own)
    assert record["round"]["rows"] == {
        "sampling": 0, "training": 2 * 2 * 2, "editing": 0, "reference": 2 * 2 * 2, "old": 0, "data": 0, "total": 16,
    }  # fmt: skip
    text = dict(planning.lines(record))
    assert text["round"] == "2 prompts x 1 = 2 pairs of pairs.jsonl, 1 update(s)"
    assert text["  data"] == "pairs.jsonl is not here; the run needs it"
    (tmp_path / "pairs.jsonl").touch()
    here = planning.plan(dataclasses.replace(own, data=str(tmp_path / "pairs.jsonl")))
    assert "  data" not in dict(planning.lines(here))
    assert text["steps"] == "nothing is sampled; trained: 2 pairs, 2 noise level(s) each"
    assert text["denoiser rows"] == "16 per round (training 8, reference 8); 32 in all"


def test_methods_say_noise_levels_and_what_they_keep_in_memory(place: Path) -> None:
    record = planning.plan(recipe_of("NFT", place, data_beta=0.5, data_samples=5))
    assert dict(planning.lines(record))["steps"] == "4 sampled; trained: 2 noise level(s) each"
    assert ("  data of the base", "20 more before the first round") in planning.lines(record)
    memory, numel = record["memory_bytes"], record["latent_elements_per_sample"]
    assert memory["old"] == memory["adapters"] > 0 and memory["stored_media"] == 0
    assert memory["stored_latents"] == 8 * (1 + 2 * 2) * numel * 4
    assert planning.plan(recipe_of("Regional", place))["memory_bytes"]["stored_media"] == 8 * 3 * 32 * 32 * 4
    assert planning.plan(recipe_of("RWR", place))["memory_bytes"]["old"] == 0


def test_comparing_with_the_base_and_keeping_groups_are_in_the_plan(place: Path) -> None:
    record = planning.plan(recipe(place, transform="log_sigmoid", transform_samples=5, replay=7))
    assert record["round"]["rows_per_new_prompt"] == 5 * 4
    assert record["memory_bytes"]["replay"] * 6 == record["memory_bytes"]["stored_latents"] * 7 * 3
    assert ("  base rewards", "20 more when a prompt is first drawn") in planning.lines(record)
    without = planning.plan(recipe(place))
    assert without["round"]["rows_per_new_prompt"] == without["memory_bytes"]["replay"] == 0


def test_full_fine_tuning_costs_a_copy_of_the_denoiser(place: Path) -> None:
    record = planning.plan(recipe(place, train=Full()))
    own = record["parameters"]["transformer"]
    assert record["memory_bytes"]["reference"] == 4 * own and record["memory_bytes"]["optimizer"] == 8 * own
    assert planning.plan(recipe(place))["memory_bytes"]["reference"] == 0


# measured


def test_measuring_fills_in_what_was_not_known_and_trains_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    digest = measuring.digest

    def noted(tensors: Any) -> str:
        seen.append(digest(tensors))
        return seen[-1]

    monkeypatch.setattr(measuring, "digest", noted)
    own = recipe(place, call={**CALL, "guidance_scale": 4.0})
    record = planning.measured(planning.plan(own), own)
    assert len(seen) == 2 and seen[0] == seen[1]
    found = record["measured"]
    assert found["rows_per_sample"] == record["round"]["rows_per_sample"] == 2
    assert found["signal_fraction"] == 1.0  # brightness differs between any two random pictures
    assert found["seconds_per_round"] > 0 and found["peak_memory_bytes"] > 2**20
    assert "not measured" not in dict(planning.lines(record))["seconds per round"]


def test_a_changed_weight_is_noticed_by_the_measurement() -> None:
    weight = torch.zeros(3)
    before = measuring.digest([weight])
    weight[1] = 1e-30
    assert measuring.digest([weight]) != before


def test_measuring_without_weights_is_refused() -> None:
    own = GRPO(model="sd-1.5", prompts="none.txt", rewards={"ocr": 1.0})
    with pytest.raises(RecipeError, match="needs the weights of 'sd-1.5' on disk"):
        planning.measured(planning.plan(own), own)


# tiny


@pytest.mark.parametrize("stem", configurations())
def test_every_shipped_configuration_shrinks_to_what_a_laptop_builds(stem: str) -> None:
    record = configurations()[stem]
    small = {}
    for name, part in record["components"].items():
        cls = class_named(part["library"], part["class"])
        small[name] = count(on_meta(cls, small_config(cls, part["config"])))
    assert small[record["denoiser"]] < record["components"][record["denoiser"]]["parameters"] / 100
    assert sum(small.values()) < 100_000_000


@pytest.mark.parametrize("stem", ["sdxl", "flux.1-dev"])
def test_a_published_model_made_tiny_is_a_pipeline_that_trains(stem: str, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    own = GRPO(model=stem, prompts="none.txt", rewards={"ocr": 1.0}, micro_batch=16)
    small = tiny(own, tmp_path)
    assert isinstance(small, GRPO)
    assert small.steps == 2 and small.micro_batch == 2 and small.rewards == {"ocr": 1.0, "brightness": 1.0}
    pipe = DiffusionPipeline.from_pretrained(small.model)
    with Policy(pipe, train=LoRA(rank=2, alpha=2.0)) as policy:
        cond = policy.condition(["a red cat"], num_steps=2, **small.call)
        x = policy.initial_latents(cond, torch.Generator().manual_seed(0))
        policy.velocity(x, cond.timesteps[0], cond).square().mean().backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in policy.parameters())
        assert policy.decode(x, cond).shape == (1, 3, 64, 64)


def test_a_small_model_keeps_its_sizes_and_gets_other_weights(place: Path, tmp_path: Path) -> None:
    assert write_model(str(place / "model"), tmp_path / "out") == "StableDiffusion3Pipeline"
    file = Path("transformer") / "diffusion_pytorch_model.safetensors"
    own, new = place / "model" / file, tmp_path / "out" / file
    assert own.stat().st_size == new.stat().st_size and own.read_bytes() != new.read_bytes()


def test_a_network_that_cannot_be_built_is_named(place: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(place / "model", broken)
    file = broken / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_attention_heads": "many"}), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"cannot build transformer \(SD3Transformer2DModel\)"):
        write_model(str(broken), tmp_path / "out")


def test_sections_of_a_rotary_embedding_fill_half_a_head() -> None:
    config = {
        "hidden_size": 3584,
        "num_attention_heads": 28,
        "rope_parameters": {"mrope_section": [16, 24, 24]},
    }
    small = shrink.text_encoder(config)
    assert sum(small["rope_parameters"]["mrope_section"]) == 3584 // shrink.FACTOR // 2


def test_building_a_configuration_gives_the_same_sizes_as_the_meta_device() -> None:
    part = configurations()["sd-1.5"]["components"]["vae"]
    cls = class_named(part["library"], part["class"])
    small = small_config(cls, part["config"])
    assert count(build(cls, small)) == count(on_meta(cls, small))


@pytest.mark.parametrize(("method", "kind"), [("DPO", "pairs"), ("RWR, anchors", "samples")])
def test_a_recipe_that_learns_from_data_gets_data_of_its_own(
    method: str, kind: str, place: Path, tmp_path: Path
) -> None:
    own = recipe_of(method, place, prompts=None, data="not-here.jsonl")
    small = tiny(own, tmp_path / "tiny")
    assert isinstance(small, Recipe) and small.data == str(tmp_path / "tiny" / "data" / f"{kind}.jsonl")
    small.validate()
    run = Run(small, RunDir.create(tmp_path / "run"), StopFlag())
    try:
        for step in range(2):
            metrics = run.round(step)
            assert math.isfinite(metrics["policy/loss"]) and metrics["policy/grad_norm"] > 0
    finally:
        run.policy.close()


def test_data_of_a_video_pipeline_are_videos_with_the_prompts_of_the_recipes_own(tmp_path: Path) -> None:
    own = {"prompt": "a red kite", "prompt_id": 7, "target": "kite", "chosen": "a.png", "rejected": "b.png"}
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), (len(name), 0, ord(name[0]))).save(tmp_path / name)
    (tmp_path / "own.jsonl").write_text(json.dumps(own), encoding="utf-8")
    call = {"height": 16, "width": 24, "num_frames": 5}
    file = write_data(str(tmp_path / "own.jsonl"), "pairs", call, tmp_path / "out", 3)
    pairs = load_pairs(file).rows
    assert [str(p.prompt) for p in pairs][:2] == ["a red kite", 'a red sign that says "A1"']
    assert pairs[0].prompt.columns["target"] == "kite" and {p.kind for p in pairs} == {"video"}
    assert read_video(Path(str(pairs[2].chosen)), 5).shape == (5, 3, 16, 24)


def test_a_tree_made_tiny_has_one_split(place: Path, tmp_path: Path) -> None:
    own = recipe_of("GRPO, tree", place, plan="window", window=3, branch_width=3, group_size=27, num_steps=8)
    small = tiny(own, tmp_path)
    small.validate()
    assert isinstance(small, GRPO)
    assert (small.group_size, small.branch_width, small.window) == (2, 2, 1)
