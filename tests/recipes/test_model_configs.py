"""The configurations of real models build on the meta device and have the published numbers of parameters."""

from __future__ import annotations

import importlib
import inspect
import json
from math import prod
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from alignkit import shipped

FOLDER = shipped.path("recipes", "configs")
CONFIGS = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.json"))}

PUBLISHED = {  # parameters of the denoiser in the checkpoint on the hub
    "sd-1.5": 859_520_964,
    "sdxl": 2_567_463_684,
    "sd-3.5-medium": 2_243_171_520,
    "flux.1-dev": 11_901_408_320,
    "qwen-image": 20_430_401_088,
    "wan2.1-t2v-1.3b": 1_418_996_800,
    "ltx-video": 1_923_385_472,
    "hunyuanvideo": 12_821_012_544,
    "cogvideox-2b": 1_693_783_872,
    "cogvideox-5b": 5_570_283_072,
}
COMPONENTS = [(key, name) for key, model in CONFIGS.items() for name in model["components"]]


def build(component: dict[str, Any]) -> nn.Module:
    """The component on the meta device: shapes without storage."""
    cls = getattr(importlib.import_module(component["library"]), component["class"])
    with torch.device("meta"):
        if component["library"] == "diffusers":
            return cls.from_config(component["config"])
        return cls(cls.config_class(**component["config"]))


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_model_has_a_published_number_to_compare_with() -> None:
    assert set(CONFIGS) == set(PUBLISHED)


@pytest.mark.parametrize("key", PUBLISHED)
def test_the_denoiser_has_the_published_number_of_parameters(key: str) -> None:
    model = CONFIGS[key]
    assert parameters(build(model["components"][model["denoiser"]])) == PUBLISHED[key]


@pytest.mark.parametrize("key, name", COMPONENTS)
def test_a_component_has_the_number_of_parameters_its_file_states(key: str, name: str) -> None:
    component = CONFIGS[key]["components"][name]
    assert parameters(build(component)) == component["parameters"]


@pytest.mark.parametrize("key", CONFIGS)
def test_no_key_of_a_diffusers_config_is_ignored_by_its_class(key: str) -> None:
    for component in CONFIGS[key]["components"].values():
        if component["library"] == "diffusers":
            known = inspect.signature(getattr(diffusers, component["class"]).__init__).parameters
            assert set(component["config"]) <= set(known)


@pytest.mark.parametrize("key", CONFIGS)
def test_the_components_and_sampling_keywords_are_those_of_the_pipeline(key: str) -> None:
    model = CONFIGS[key]
    pipeline = getattr(diffusers, model["pipeline"])
    assert set(model["components"]) <= set(inspect.signature(pipeline.__init__).parameters)
    assert set(model["sampling"]) <= set(inspect.signature(pipeline.__call__).parameters)


@pytest.mark.parametrize("key", CONFIGS)
def test_every_lora_target_matches_a_linear_layer_of_the_denoiser(key: str) -> None:
    model = CONFIGS[key]
    denoiser = build(model["components"][model["denoiser"]])
    linear = [f".{name}" for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    for target in model["lora_targets"]:
        assert any(name.endswith(f".{target}") for name in linear), target


@pytest.mark.parametrize("key", CONFIGS)
def test_the_latent_shape_holds_one_latent_per_compressed_pixel(key: str) -> None:
    model = CONFIGS[key]
    call, channels = model["sampling"], {"ltx-video": 128}.get(key, 4 if key in ("sd-1.5", "sdxl") else 16)
    space, time = (32, 8) if key == "ltx-video" else (8, 4)
    frames = (call["num_frames"] - 1) // time + 1 if "num_frames" in call else 1
    pixels = (call["height"] // space) * (call["width"] // space)
    assert prod(model["latent_shape"]) == channels * frames * pixels
