"""LoRA files: what is saved loads in plain diffusers and gives the same output; what is read found every layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from alignkit.errors import PolicyError, RecipeError
from alignkit.policy import Full, LoRA, Policy, lora_files
from alignkit.policy.adapters import layer_pairs
from alignkit.policy.lora_files import FILE, export_comfyui, save_lora
from alignkit.policy.lora_formats import load_lora
from tests.policy.test_adapters import load_user_lora, move, tree
from tests.policy.zoo import PROMPTS, ZOO, own_steps

State = dict[str, torch.Tensor]


def first_output(pipe: DiffusionPipeline, name: str) -> torch.Tensor:
    """(B, ...) what the pipeline's own loop hands to its scheduler first: no code of ours involved."""
    entry = ZOO[name]
    variant = next(iter(entry.variants.values()))
    return own_steps(pipe, num_steps=2, **{**entry.call, **variant})[0].model_output


def trained(name: str, config: LoRA | None = None) -> Policy:
    policy = Policy(ZOO[name].build(), config or LoRA(rank=3, alpha=5.0))
    move(policy)
    return policy


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("z_image", "sana", "auraflow", "lumina2", "ltx_t2v")]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "qwen_image", "wan_t2v", *SLOW])
def test_a_saved_lora_loads_in_a_fresh_pipeline_and_gives_the_trained_output(name: str, tmp_path: Path) -> None:
    policy = trained(name)
    base = first_output(ZOO[name].build(), name)
    expected = first_output(policy.pipe, name)
    save_lora(policy, tmp_path)
    fresh = ZOO[name].build()
    fresh.load_lora_weights(tmp_path)
    loaded = first_output(fresh, name)
    assert (loaded - expected).abs().max() < 1e-4
    assert (loaded - base).abs().max() > 1e-2


def test_a_second_expert_has_a_file_of_its_own(tmp_path: Path) -> None:
    entry = ZOO["wan_two_experts"]
    call = {**entry.call, **next(iter(entry.variants.values()))}
    policy, fresh = trained("wan_two_experts"), entry.build()
    base, expected = (own_steps(pipe, num_steps=3, **call) for pipe in (fresh, policy.pipe))
    save_lora(policy, tmp_path)
    fresh.load_lora_weights(tmp_path, adapter_name="first")
    second = {"weight_name": "transformer_2.safetensors", "load_into_transformer_2": True}
    fresh.load_lora_weights(tmp_path, adapter_name="second", **second)
    loaded = own_steps(fresh, num_steps=3, **call)
    for before, ours, theirs in zip(base, expected, loaded, strict=True):
        assert (theirs.model_output - ours.model_output).abs().max() < 1e-4
        assert (before.model_output - ours.model_output).abs().max() > 1e-2


def test_saving_leaves_the_policy_and_the_pipeline_as_they_were(tmp_path: Path) -> None:
    policy = trained("sd3")
    policy.snapshot("ema")
    cond = policy.condition(list(PROMPTS), num_steps=3, **ZOO["sd3"].call)
    before, state = tree(policy.pipe), torch.get_rng_state()
    x, t = policy.initial_latents(cond, torch.Generator().manual_seed(0)), cond.timesteps[0]
    output = policy.model_output(x, t, cond)
    assert save_lora(policy, tmp_path / "lora", cond=cond) == tmp_path / "lora"
    assert tree(policy.pipe) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(policy.model_output(x, t, cond), output)
    assert [file.name for file in (tmp_path / "lora").iterdir()] == [FILE]


def test_the_file_has_diffusers_keys_and_its_header_the_rank_and_alpha(tmp_path: Path) -> None:
    policy = trained("sd3")
    save_lora(policy, tmp_path)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        keys, config = set(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])
    layers = layer_pairs(policy.weights.modules, "alignkit")["transformer"]
    assert keys == {f"transformer.{layer}.lora_{x}.weight" for layer in layers for x in "AB"}
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (3, 5.0)


def test_the_moving_average_is_saved_when_asked(tmp_path: Path) -> None:
    policy = trained("sd3")
    with pytest.raises(PolicyError, match=r'policy\.snapshot\("ema"\)'):
        save_lora(policy, tmp_path, ema=True)
    policy.snapshot("ema")
    with policy.ema():
        expected = first_output(policy.pipe, "sd3")
    move(policy, seed=9)
    save_lora(policy, tmp_path, ema=True)
    fresh = ZOO["sd3"].build()
    fresh.load_lora_weights(tmp_path)
    assert (first_output(fresh, "sd3") - expected).abs().max() < 1e-4


def test_saving_beside_a_lora_of_the_users_saves_the_trained_one_alone(tmp_path: Path) -> None:
    pipe = ZOO["sd3"].build()
    load_user_lora(pipe)
    policy = Policy(pipe, LoRA(rank=3, alpha=5.0))
    move(policy)
    expected, before = first_output(pipe, "sd3"), tree(pipe)
    save_lora(policy, tmp_path)
    assert tree(pipe) == before
    fresh = ZOO["sd3"].build()
    load_user_lora(fresh)
    fresh.load_lora_weights(tmp_path, adapter_name="aligned")
    fresh.set_adapters(["style", "aligned"])
    assert (first_output(fresh, "sd3") - expected).abs().max() < 1e-4


@pytest.mark.parametrize("fault", ["wrong prefix", "no metadata", "other values", "a layer less"])
def test_a_file_that_would_not_reproduce_the_model_is_an_error(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = trained("sd3")
    before = tree(policy.pipe)
    replace = lora_files._replace

    def spoiled(file: Path, tensors: State, header: dict[str, str]) -> None:
        if fault == "wrong prefix":
            tensors = {key.replace("transformer.", "base_model.model.", 1): t for key, t in tensors.items()}
        if fault == "no metadata":
            header = {"format": "pt"}
        if fault == "other values":
            tensors = {key: t + (0.01 if "lora_B" in key else 0) for key, t in tensors.items()}
        if fault == "a layer less":
            layer = next(iter(tensors)).split(".lora_")[0]
            tensors = {key: t for key, t in tensors.items() if not key.startswith(f"{layer}.")}
            header = {"format": "pt"}
        replace(file, tensors, header)

    monkeypatch.setattr(lora_files, "_replace", spoiled)
    with pytest.raises(PolicyError, match=r"tensors into transformer|loads differently"):
        save_lora(policy, tmp_path)
    assert tree(policy.pipe) == before


def test_a_pipeline_without_a_lora_loader_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="PixArtSigmaPipeline has no load_lora_weights"):
        save_lora(trained("pixart"), tmp_path)


def test_only_an_adapter_can_be_saved_as_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="save_pretrained"):
        save_lora(Policy(ZOO["sd3"].build(), Full()), tmp_path)


# starting from files


def kohya(state: State, alpha: float) -> State:
    found = {}
    for key, tensor in state.items():
        layer, _, role = key.removeprefix("transformer.").removeprefix("unet.").partition(".lora_")
        name = f"lora_unet_{layer.replace('.', '_')}"
        found[f"{name}.lora_{'down' if role[0] == 'A' else 'up'}.weight"] = tensor
        found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


def peft(state: State, alpha: float) -> State:
    return {f"base_model.model.{key.partition('.')[2]}": tensor for key, tensor in state.items()}


def original_prefix(state: State, alpha: float) -> State:
    return {f"diffusion_model.{key.partition('.')[2]}": tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("sd15", kohya),
        ("sd3", None),
        ("sd3", kohya),
        ("sd3", peft),
        ("qwen_image", peft),
        ("qwen_image", original_prefix),
    ],
)
def test_training_starts_from_a_lora_file_in_any_form(
    name: str, form: Callable[[State, float], State] | None, tmp_path: Path
) -> None:
    source = trained(name)
    expected = first_output(source.pipe, name)
    file = save_lora(source, tmp_path) / FILE
    if form is not None:
        state = form(load_file(file), 5.0)
        file = tmp_path / "adapter_model.safetensors"
        save_file(state, file)
        (tmp_path / FILE).unlink()
        if form in (peft, original_prefix):
            (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 5.0}))
    policy = Policy(ZOO[name].build(), LoRA(), init_lora=file)
    assert (first_output(policy.pipe, name) - expected).abs().max() < 1e-5
    assert all(p.requires_grad for p in policy.parameters())
    assert sum(p.numel() for p in policy.parameters()) == sum(p.numel() for p in source.parameters())
    with policy.reference():
        base = first_output(ZOO[name].build(), name)
        torch.testing.assert_close(first_output(policy.pipe, name), base, rtol=0, atol=0)
    policy.snapshot("old")
    with policy.old():
        assert (first_output(policy.pipe, name) - expected).abs().max() < 1e-5


def test_ranks_and_alphas_of_single_layers_survive_reading_and_saving(tmp_path: Path) -> None:
    source = trained("sd3")
    state = kohya(load_file(save_lora(source, tmp_path / "one") / FILE), 5.0)
    name = next(key for key in state if key.endswith("attn_to_q.lora_down.weight")).removesuffix(".lora_down.weight")
    state[f"{name}.lora_down.weight"] = torch.cat([state[f"{name}.lora_down.weight"]] * 2)  # rank 6
    state[f"{name}.lora_up.weight"] = torch.cat([state[f"{name}.lora_up.weight"]] * 2, dim=1) / 2
    state[f"{name}.alpha"] = torch.tensor(10.0)
    save_file(state, tmp_path / "mixed.safetensors")
    policy = Policy(ZOO["sd3"].build(), LoRA(), init_lora=tmp_path / "mixed.safetensors")
    expected = first_output(source.pipe, "sd3")
    assert (first_output(policy.pipe, "sd3") - expected).abs().max() < 1e-5
    save_lora(policy, tmp_path / "two")
    fresh = ZOO["sd3"].build()
    fresh.load_lora_weights(tmp_path / "two")
    assert (first_output(fresh, "sd3") - expected).abs().max() < 1e-4


def test_a_kohya_file_with_original_sdxl_names_is_read_by_the_pipelines_own_converter(tmp_path: Path) -> None:
    pipe = ZOO["sdxl"].build()
    width = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q").weight.shape
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    rng = torch.Generator().manual_seed(0)
    state = {
        f"{name}.lora_down.weight": torch.randn(2, width[1], generator=rng),
        f"{name}.lora_up.weight": torch.randn(width[0], 2, generator=rng),
        f"{name}.alpha": torch.tensor(1.0),
    }
    save_file(state, tmp_path / "kohya.safetensors")
    (pairs,) = load_lora(tmp_path / "kohya.safetensors", pipe).values()
    assert [(k, p.rank, p.alpha) for k, p in pairs.items()] == [
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 2, 1.0)
    ]
    policy = Policy(pipe, LoRA(), init_lora=tmp_path)
    fresh = ZOO["sdxl"].build()
    fresh.load_lora_weights(tmp_path / "kohya.safetensors")
    assert (first_output(policy.pipe, "sdxl") - first_output(fresh, "sdxl")).abs().max() < 1e-5


def test_training_starts_from_a_file_beside_a_lora_of_the_users(tmp_path: Path) -> None:
    source = trained("sd3")
    save_lora(source, tmp_path)
    both = ZOO["sd3"].build()
    load_user_lora(both)
    both.load_lora_weights(tmp_path, adapter_name="aligned")
    both.set_adapters(["style", "aligned"])
    pipe = ZOO["sd3"].build()
    load_user_lora(pipe)
    policy = Policy(pipe, LoRA(), init_lora=tmp_path)
    assert (first_output(pipe, "sd3") - first_output(both, "sd3")).abs().max() < 1e-5
    assert not any(p.requires_grad for n, p in pipe.transformer.named_parameters() if ".style." in n)
    assert all(p.requires_grad for p in policy.parameters())


def test_a_file_of_which_nothing_matches_says_so_with_numbers(tmp_path: Path) -> None:
    save_file(
        {f"blocks.{i}.lora_{x}.weight": torch.zeros(2, 2) for i in range(48) for x in "AB"}, tmp_path / "x.safetensors"
    )
    with pytest.raises(RecipeError, match=r"0 of 96 tensors of x\.safetensors matched .*blocks\.0\.lora_A\.weight"):
        Policy(ZOO["sd3"].build(), LoRA(), init_lora=tmp_path)


def test_tensors_for_text_encoders_are_refused_with_a_way_out(tmp_path: Path) -> None:
    state = load_file(save_lora(trained("sd3"), tmp_path) / FILE)
    state["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 16)
    save_file(state, tmp_path / FILE)
    with pytest.raises(RecipeError, match=r"text encoders .*pipe\.load_lora_weights"):
        load_lora(tmp_path, ZOO["sd3"].build())


@pytest.mark.parametrize("fault", ["shape", "half", "dora", "pickle", "cut"])
def test_files_that_cannot_be_used_are_refused_by_name(fault: str, tmp_path: Path) -> None:
    file = save_lora(trained("sd3"), tmp_path) / FILE
    state = load_file(file)
    key = next(iter(state))
    match fault:
        case "shape":
            state[key] = torch.zeros(3, 999)
        case "half":
            del state[key]
        case "dora":
            state[key.replace("lora_A.weight", "dora_scale").replace("lora_B.weight", "dora_scale")] = torch.zeros(1)
    save_file(state, file)
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    if fault == "pickle":
        file = file.rename(tmp_path / "lora.bin")
    expected = {
        "shape": "for another model",
        "half": "is not complete",
        "dora": "DoRA",
        "pickle": "can execute code",
        "cut": "not a complete safetensors file",
    }
    with pytest.raises(RecipeError, match=expected[fault]):
        load_lora(file, ZOO["sd3"].build())


def test_a_lora_file_without_an_adapter_to_train_is_an_error(tmp_path: Path) -> None:
    save_lora(trained("sd3"), tmp_path)
    for train in (None, Full()):
        with pytest.raises(RecipeError, match=r"train=LoRA\(\)"):
            Policy(ZOO["sd3"].build(), train, init_lora=tmp_path)


# ComfyUI


@pytest.mark.parametrize("name", ["qwen_image", "wan_t2v", "ltx_t2v"])
def test_a_comfyui_file_has_original_names_and_one_alpha_a_layer_and_nothing_folded(name: str, tmp_path: Path) -> None:
    policy = trained(name)
    state = load_file(export_comfyui(policy, tmp_path / "comfy.safetensors"))
    pairs = layer_pairs(policy.weights.modules, "alignkit")["transformer"]
    assert all(key.startswith("diffusion_model.") for key in state)
    assert len(state) == 3 * len(pairs)
    values = [pair.a for pair in pairs.values()]
    assert all(any(torch.equal(state[k], a) for a in values) for k in state if k.endswith("lora_A.weight"))
    assert {float(state[key]) for key in state if key.endswith(".alpha")} == {5.0}
    if name == "wan_t2v":
        assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in state
    fresh = ZOO[name].build()
    if name == "ltx_t2v":  # diffusers reads no alpha for it; ComfyUI does
        state = {k: v * 5 / 3 if "lora_B" in k else v for k, v in state.items() if not k.endswith(".alpha")}
    fresh.load_lora_weights(state)
    assert (first_output(fresh, name) - first_output(policy.pipe, name)).abs().max() < 1e-4


def test_a_model_whose_original_names_are_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="SD3Transformer2DModel"):
        export_comfyui(trained("sd3"), tmp_path / "comfy.safetensors")
