"""Saving the trained adapter so that plain diffusers loads it, and proving that it does before saying so."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from alignkit.errors import PolicyError, RecipeError
from alignkit.policy.adapters import COMPANIONS, TRAINED, LoRAWeights, Pair, layer_pairs
from alignkit.policy.conditioning import Conditioning
from alignkit.policy.lora_formats import METADATA, quiet
from alignkit.policy.standin import class_attribute

if TYPE_CHECKING:
    from alignkit.policy.pipeline import Policy

FILE = "pytorch_lora_weights.safetensors"
CHECK = "alignkit_check"
TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2  # relative, of denoiser outputs in bfloat16 and float16

ORIGINAL_NAMES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "QwenImageTransformer2DModel": (),  # the same names
    "LTXVideoTransformer3DModel": (),  # the same inside the blocks
    "WanTransformer3DModel": (
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_([qkv])$", r".\1"),
        (r"\.add_([kv])_proj$", r".\1_img"),
        (r"\.to_out\.0$", ".o"),
        (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
        (r"\.ffn\.net\.2$", ".ffn.2"),
    ),
}
"""From diffusers' layer names to those of the original code, by denoiser class: what ComfyUI looks for."""


def save_lora(policy: Policy, folder: str | Path, *, ema: bool = False, cond: Conditioning | None = None) -> Path:
    """Write the trained adapter in diffusers' own format and load it back to compare.

    `pipe.load_lora_weights(folder)` reproduces the trained output: the file's header carries rank and alpha. A second
    expert (Wan 2.2) goes into `transformer_2.safetensors`, for
    `pipe.load_lora_weights(folder, weight_name="transformer_2.safetensors", load_into_transformer_2=True)`.

    Args:
        ema: save the moving average instead of the trained weights.
        cond: compare outputs of the whole pipeline's denoiser on it too; without it every layer is compared.

    Returns:
        the folder.

    Raises:
        PolicyError: the pipeline's class loads no LoRA, or what it loaded is not what was trained.
        RecipeError: the policy trains no adapter.
    """
    weights = _adapters(policy)
    if class_attribute(type(policy.pipe), "load_lora_weights") is None:
        raise PolicyError(
            f"{type(policy.pipe).__name__} has no load_lora_weights, so no LoRA file of it could be loaded; keep the "
            "run's checkpoint (policy.weights.state()) and load it with policy.weights.load"
        )
    adapter = COMPANIONS["ema"] if ema else TRAINED
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    saved = {part: pairs for part, pairs in layer_pairs(weights.modules, adapter).items() if pairs}
    if not saved:
        raise PolicyError(f'there are no {"ema" if ema else "trained"} weights; policy.snapshot("ema") makes them')
    for part, pairs in saved.items():
        _write(folder / _file_name(policy.pipe, part), _prefix(part), pairs)
    verify(policy, folder, adapter, saved, cond)
    return folder


def export_comfyui(policy: Policy, file: str | Path, *, ema: bool = False) -> Path:
    """Write `diffusion_model.*` keys with one `.alpha` tensor per layer, as ComfyUI reads them.

    Checked by the pipeline's own converter of original names, which must give back the layers that were written.

    Raises:
        PolicyError: alignkit does not know the original names of this model's layers.
    """
    weights = _adapters(policy)
    file = Path(file)
    pairs_of = layer_pairs(weights.modules, COMPANIONS["ema"] if ema else TRAINED)
    part, pairs = next(iter(pairs_of.items()))
    model = type(weights.modules[part]).__name__
    if model not in ORIGINAL_NAMES or len(pairs_of) != 1:
        raise PolicyError(
            f"alignkit knows the original layer names of {', '.join(ORIGINAL_NAMES)}, not of {model}; ComfyUI reads "
            "diffusers' files (save_lora) of SD 3, FLUX.1, AuraFlow and PixArt as they are"
        )
    tensors: dict[str, torch.Tensor] = {}
    for layer, pair in pairs.items():
        name = f"diffusion_model.{_original_name(model, layer)}"
        tensors[f"{name}.lora_A.weight"] = pair.a.cpu().contiguous()
        tensors[f"{name}.lora_B.weight"] = pair.b.cpu().contiguous()
    with quiet():
        back = type(policy.pipe).lora_state_dict(dict(tensors))
    missing = {f"{part}.{layer}.lora_A.weight" for layer in pairs} - set(back)
    if missing:
        raise PolicyError(f"{model}: {len(missing)} of {len(pairs)} layers have no known original name: {min(missing)}")
    for layer, pair in pairs.items():
        tensors[f"diffusion_model.{_original_name(model, layer)}.alpha"] = torch.tensor(pair.alpha)
    _replace(file, tensors, {"format": "pt"})
    return file


def _original_name(model: str, layer: str) -> str:
    for pattern, replacement in ORIGINAL_NAMES[model]:
        layer = re.sub(pattern, replacement, layer)
    return layer


def verify(
    policy: Policy,
    folder: Path,
    adapter: str,
    saved: Mapping[str, Mapping[str, Pair]],
    cond: Conditioning | None = None,
) -> int:
    """Load a saved folder with the pipeline's own loader beside our adapter, and compare.

    Returns:
        how many tensors were compared; the check adapter is gone afterwards.

    Raises:
        PolicyError: a layer is missing or differs, or the denoiser's output differs by more than 1e-4.
    """
    weights = _adapters(policy)
    with policy._lock, _loaded(policy.pipe, weights, folder, saved):
        total = 0
        for part, loaded in layer_pairs(weights.modules, CHECK).items():
            ours = saved.get(part, {})
            matched = ours.keys() & loaded.keys()
            if len(matched) < len(ours):
                raise PolicyError(
                    f"saved to {folder}, but {type(policy.pipe).__name__}.load_lora_weights put {2 * len(matched)} of "
                    f"{2 * len(ours)} tensors into {part}; the file would not reproduce the trained model"
                )
            for name in matched:
                _compare(f"{part}.{name}", ours[name], loaded[name])
            total += 2 * len(matched)
        if cond is not None:
            _compare_outputs(policy, weights, adapter, cond)
    return total


def _adapters(policy: Policy) -> LoRAWeights:
    if not isinstance(policy.weights, LoRAWeights):
        raise RecipeError(
            "only a policy with train=LoRA(...) has an adapter to save; with Full() save the pipeline itself: "
            "policy.pipe.save_pretrained(folder)"
        )
    return policy.weights


def _prefix(part: str) -> str:
    return "transformer" if part == "transformer_2" else part


def _file_name(pipe: Any, part: str) -> str:
    if part != "transformer_2":
        return FILE
    if part not in (class_attribute(type(pipe), "_lora_loadable_modules") or ()):
        raise PolicyError(f"{type(pipe).__name__} loads no LoRA into its second expert {part}")
    return f"{part}.safetensors"


def _write(file: Path, prefix: str, pairs: Mapping[str, Pair]) -> None:
    """One component's adapters: `{prefix}.{layer}.lora_A.weight`, and the configuration in the header."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, pair in pairs.items():
        tensors[f"{prefix}.{layer}.lora_A.weight"] = pair.a.cpu().contiguous()
        tensors[f"{prefix}.{layer}.lora_B.weight"] = pair.b.cpu().contiguous()
    config = {f"{prefix}.{key}": value for key, value in _peft_config(pairs).items()}
    _replace(file, tensors, {"format": "pt", METADATA: json.dumps(config, sort_keys=True)})


def _peft_config(pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """The keywords of `peft.LoraConfig` that give these layers their ranks and alphas."""
    first = next(iter(pairs.values()))
    return {
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {f"^{re.escape(k)}": p.rank for k, p in pairs.items() if p.rank != first.rank},
        "alpha_pattern": {f"^{re.escape(k)}": p.alpha for k, p in pairs.items() if p.alpha != first.alpha},
        "target_modules": sorted(pairs),
    }


def _replace(file: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
    aside = file.with_name(f".{file.name}.partial")
    save_file(tensors, aside, metadata=header)
    os.replace(aside, file)


@contextmanager
def _loaded(pipe: Any, weights: LoRAWeights, folder: Path, saved: Mapping[str, Mapping[str, Pair]]) -> Iterator[None]:
    """Context: the saved adapter is in the pipeline under the name CHECK, not active; afterwards nothing is left."""
    flags = [(p, p.requires_grad) for module in weights.modules.values() for p in module.parameters()]
    loaded_flags = {name: vars(module).get("_hf_peft_config_loaded") for name, module in weights.modules.items()}
    with weights.using("reference"):
        try:
            with quiet(), torch.random.fork_rng(devices=[]):
                for part in saved:
                    second = {"load_into_transformer_2": True} if part == "transformer_2" else {}
                    name = _file_name(pipe, part)
                    pipe.load_lora_weights(str(folder), weight_name=name, adapter_name=CHECK, **second)
            yield
        finally:
            for name, module in weights.modules.items():
                weights.remove(name, CHECK)
                vars(module).pop("_hf_peft_config_loaded", None)
                if loaded_flags[name] is not None:
                    vars(module)["_hf_peft_config_loaded"] = loaded_flags[name]
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def _compare(layer: str, ours: Pair, loaded: Pair) -> None:
    worst = max(_distance(ours.a, loaded.a), _distance(ours.b, loaded.b))
    scales = ours.alpha / ours.rank, loaded.alpha / loaded.rank
    if worst > TOLERANCE or abs(scales[0] - scales[1]) > 1e-6:
        raise PolicyError(
            f"the saved LoRA loads differently: {layer} differs by {worst:.2e}, scale {scales[1]:g} for {scales[0]:g}"
        )


def _distance(ours: torch.Tensor, loaded: torch.Tensor) -> float:
    """Largest difference after our value is rounded as the loader rounded it; infinite for other shapes."""
    if ours.shape != loaded.shape:
        return float("inf")
    return float((ours.to(loaded).float() - loaded.float()).abs().max())


@torch.no_grad()
def _compare_outputs(policy: Policy, weights: LoRAWeights, adapter: str, cond: Conditioning) -> None:
    x = policy.initial_latents(cond, torch.Generator().manual_seed(0))
    t = cond.timesteps[len(cond.timesteps) // 2]
    outputs = []
    for name in (adapter, CHECK):
        with weights.only(name):
            outputs.append(policy.model_output(x, t, cond))
    ours, loaded = (output.float() for output in outputs)
    worst = float((ours - loaded).abs().max())
    limit = TOLERANCE if outputs[0].dtype == torch.float32 else HALF_TOLERANCE * float(ours.abs().max())
    if not worst <= limit:
        raise PolicyError(f"the saved LoRA gives outputs that differ by {worst:.2e} from the trained model's")
