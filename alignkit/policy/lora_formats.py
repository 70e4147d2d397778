"""Reading LoRA files as they are found: diffusers, kohya and PEFT keys, and what a pipeline itself can convert."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft, logging
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import nn

from alignkit.errors import RecipeError
from alignkit.policy.adapters import Initial, Pair, denoisers
from alignkit.policy.standin import class_attribute

WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
METADATA = "lora_adapter_metadata"

ROLES = {
    "a": re.compile(r"(\.lora_A(\.[^.]+)?|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight$"),
    "b": re.compile(r"(\.lora_B(\.[^.]+)?|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight$"),
    "alpha": re.compile(r"\.alpha$"),
}
PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "unet.", "lora_unet_", "lora_transformer_")
UNSUPPORTED = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa"}
ENCODERS = ("text_encoder", "lora_te", "text_encoders")


@dataclass
class Matched:
    """Tensors of one file by component, layer and role ("a", "b", "alpha"), and the keys that found no layer."""

    layers: dict[tuple[str, str], dict[str, torch.Tensor]] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)
    count: int = 0


def load_lora(path: str | Path, pipe: Any) -> Initial:
    """Adapters of a LoRA file, by component and layer of `pipe`'s denoisers.

    Args:
        path: a `.safetensors` file, or a folder that holds one (a PEFT folder with its `adapter_config.json`).

    Raises:
        RecipeError: there is no such file, a tensor of it found no layer, or it is of a kind other than plain LoRA.
    """
    file = find_file(path)
    tensors, metadata = read(file)
    modules = denoisers(pipe)
    matched = match(tensors, modules)
    if matched.strangers:
        converted = _own_conversion(pipe, file)
        again = match(converted, modules)
        if converted and len(again.strangers) < len(matched.strangers):
            matched, metadata = again, {}  # the pipeline's converters have read alphas already
    if matched.strangers:
        raise RecipeError(_stranger_message(file, matched, modules))
    pairs: dict[str, dict[str, Pair]] = {}
    for (part, layer), roles in matched.layers.items():
        pairs.setdefault(part, {})[layer] = _pair(file, part, layer, roles, metadata, modules[part])
    return pairs


def find_file(path: str | Path) -> Path:
    """The LoRA file that `path` means."""
    path = Path(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise RecipeError(f"{path} is not a .safetensors file; other formats can execute code and are not read")
        return path
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    named = [path / name for name in WEIGHTS if path / name in files]
    if named:
        return named[0]
    if len(files) != 1:
        found = ", ".join(f.name for f in files) or "none"
        raise RecipeError(f"no LoRA at {path}: expected a .safetensors file or a folder with one (found: {found})")
    return files[0]


def read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of a file, and the configuration stored in its header or beside it."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
            header = opened.metadata() or {}
    except SafetensorError as error:
        raise RecipeError(f"{file} is not a complete safetensors file ({error}); copy or download it again") from error
    kinds = {kind for part, kind in UNSUPPORTED.items() if any(part in key for key in tensors)}
    if kinds:
        raise RecipeError(f"{file.name} is a {', '.join(kinds)} file; alignkit trains plain LoRA (lora_A, lora_B)")
    beside = file.parent / "adapter_config.json"
    metadata = {}
    if METADATA in header:
        metadata = json.loads(header[METADATA])
    elif beside.is_file():
        metadata = json.loads(beside.read_text(encoding="utf-8"))
    return tensors, metadata


def match(tensors: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module]) -> Matched:
    """Find the layer of each tensor by its key."""
    names = {part: layer_names(module) for part, module in modules.items()}
    flat = {part: {name.replace(".", "_"): name for name in own} for part, own in names.items()}
    matched = Matched(count=len(tensors))
    for key, tensor in tensors.items():
        role = next((role for role, pattern in ROLES.items() if pattern.search(key)), None)
        home = None if role is None else _home(ROLES[role].sub("", key), names, flat)
        if role is None or home is None:
            matched.strangers.append(key)
        else:
            matched.layers.setdefault(home, {})[role] = tensor
    return matched


def layer_names(module: nn.Module) -> set[str]:
    """Names of the layers with a weight matrix, as they are without adapters."""
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    found = (name for name, layer in module.named_modules() if isinstance(layer, kinds))
    return {name.removesuffix(".base_layer") for name in found if "lora_" not in name}


def _home(name: str, names: Mapping[str, set[str]], flat: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    """The (component, layer) that a key without its role means."""
    parts = list(names)
    while True:
        for part in parts:
            if name in names[part]:
                return part, name
            if name in flat[part]:
                return part, flat[part][name]
        component = next((part for part in names if name.startswith(f"{part}.")), None)
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if component is not None:
            parts, name = [component], name.removeprefix(f"{component}.")
        elif prefix is not None:
            name = name.removeprefix(prefix)
        else:
            return None


def _pair(
    file: Path, part: str, layer: str, roles: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], module: nn.Module
) -> Pair:
    missing = sorted(role.upper() for role in {"a", "b"} - roles.keys())
    if missing:
        raise RecipeError(f"{file.name} is not complete: {part}.{layer} has no lora_{' and no lora_'.join(missing)}")
    a, b = roles["a"].float(), roles["b"].float()
    rank = a.shape[0]
    owner = module.get_submodule(layer)
    weight = owner.get_parameter("base_layer.weight" if "base_layer" in owner._modules else "weight")
    fits = b.shape[:2] == (weight.shape[0], rank) and a.shape[1:] == weight.shape[1:]
    if not fits:
        raise RecipeError(
            f"{file.name} is for another model: {part}.{layer} has a weight of shape {tuple(weight.shape)}, the file "
            f"brings lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}"
        )
    alpha = float(roles["alpha"]) if "alpha" in roles else _alpha(metadata, part, layer, rank)
    return Pair(a, b, alpha)


def _alpha(metadata: Mapping[str, Any], part: str, layer: str, rank: int) -> float:
    """alpha by the stored configuration, such that alpha / rank is the scale; without one the scale is 1."""
    own = {key.removeprefix(f"{part}."): value for key, value in metadata.items() if key.startswith(f"{part}.")}
    config = own or metadata
    if "lora_alpha" not in config:
        return float(rank)
    if config.get("use_dora"):
        raise RecipeError("the LoRA is a DoRA by its configuration (use_dora); alignkit trains plain LoRA")
    patterns = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), layer), config["lora_alpha"]))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _own_conversion(pipe: Any, file: Path) -> dict[str, torch.Tensor]:
    """What the pipeline's own loader makes of a file with original names; empty where it cannot read it."""
    if class_attribute(type(pipe), "lora_state_dict") is None:
        return {}
    unet = vars(pipe).get("unet")
    extra = {} if unet is None else {"unet_config": unet.config}
    with quiet():
        try:
            result = type(pipe).lora_state_dict(str(file), use_safetensors=True, return_lora_metadata=True, **extra)
        except (ValueError, KeyError, IndexError, AttributeError, TypeError, RuntimeError):
            return {}
    tensors = dict(result[0])
    alphas = result[1] if len(result) == 3 and result[1] else {}
    old_names = {key: f"{key.removesuffix('.alpha')}" for key in alphas}
    renamed = convert_unet_state_dict_to_peft({old: torch.tensor(0.0) for old in old_names.values()})
    layers = dict(zip(old_names, renamed, strict=True))
    tensors = tensors if any("lora_A" in key for key in tensors) else convert_unet_state_dict_to_peft(tensors)
    return tensors | {f"{layers[k].split('.lora_A')[0]}.alpha": torch.tensor(float(v)) for k, v in alphas.items()}


def _stranger_message(file: Path, matched: Matched, modules: Mapping[str, nn.Module]) -> str:
    where = " and ".join(f"{part} ({type(module).__name__})" for part, module in modules.items())
    found = matched.count - len(matched.strangers)
    message = f"{found} of {matched.count} tensors of {file.name} matched a layer of {where}"
    example = matched.strangers[0]
    if all(key.startswith(ENCODERS) for key in matched.strangers):
        return (
            f"{message}; the others are for text encoders ({example}), which alignkit does not train. Load that LoRA "
            "with pipe.load_lora_weights (it stays active, frozen) or remove its text-encoder tensors"
        )
    return (
        f"{message}; the first without one is {example!r}. Expected diffusers (transformer.X.lora_A.weight), "
        "kohya (lora_unet_X.lora_down.weight) or PEFT (base_model.model.X.lora_A.weight) keys of the same model"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Context: diffusers and peft say nothing below errors (their loaders warn of things that are checked here)."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="peft")
            yield
    finally:
        logging.set_verbosity(before)
