"""Image features of self-supervised vision transformers (DINO), differentiable to the pixels.

Every feature that leaves this file is L2-normalised, class token and patches alike, by `normalised`: whatever is
trained on these features is also scored on them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from alignkit.errors import RewardError
from alignkit.rewards import weights as on_disk
from alignkit.rewards.random_weights import random_network
from alignkit.rewards.weights import Files


@dataclass(frozen=True)
class Features:
    """Features of B images, each vector of length 1.

    Attributes:
        cls: (B, D) class token.
        patches: (B, N, D) patch tokens, row by row from the top left; register tokens are left out.
    """

    cls: torch.Tensor
    patches: torch.Tensor

    def __getitem__(self, rows: slice | list[int]) -> Features:
        """The same of some of the images."""
        return Features(self.cls[rows], self.patches[rows])

    def to(self, device: torch.device) -> Features:
        """The same on another device."""
        return Features(self.cls.to(device), self.patches.to(device))


def normalised(tokens: torch.Tensor) -> torch.Tensor:
    """(..., D) float32 vectors of length 1; a zero vector stays zero."""
    return F.normalize(tokens.float(), dim=-1)


@dataclass(frozen=True, eq=False)
class DinoFeatures:
    """The feature extractor: a frozen self-supervised ViT with its own preprocessing, differentiable to the pixels.

    Attributes:
        weights: hub id or folder of a transformers model (Dinov2, with or without registers, Dinov3) or of a timm one
            (`timm/vit_base_patch14_dinov2.lvd142m`); told apart by its config.json.
        size: (height, width) that the whole image is resized to, without cropping. None: the resize and the centre
            crop that the weights were published with, which cut off the ends of a wide image.
        dtype: of the network; features are float32.
    """

    weights: str = "facebook/dinov2-base"
    size: tuple[int, int] | None = None
    dtype: str = "float32"

    def files(self) -> tuple[Files, ...]:
        """The weights, their configuration, and the preprocessing of a transformers model."""
        # only some have preprocessing of their own, and only large ones an index of several files of weights
        others = "preprocessor_config.json|*.safetensors.index.json|config.json"
        return (Files(self.weights, ("config.json", "*.safetensors", others)),)

    @cached_property
    def network(self) -> Backbone:
        """The frozen network."""
        folder = on_disk.locate(self.files()[0])
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        load = _from_timm if "architecture" in config else _from_transformers
        network = load(folder, self.weights, self.size)
        on_disk.frozen(network, self.dtype)
        return network

    @property
    def width(self) -> int:
        """D, the length of a feature vector."""
        return self.network.width

    def features(self, media: torch.Tensor) -> Features:
        """Features of (B, 3, H, W), float in [0, 1]; gradients flow to the media."""
        cls, patches = on_disk.on(self.network, media.device)(media)
        return Features(normalised(cls), normalised(patches))


class Backbone(nn.Module):
    """A network with its own preprocessing: (B, 3, H, W) in [0, 1] -> class token (B, D) and patches (B, N, D).

    Args:
        tokens: what the network makes of preprocessed pixels, (B, prefix + N, D), class token first.
        prefix: how many tokens come before the patches: the class token and the registers.
        width: D.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[torch.Tensor], torch.Tensor],
        tokens: Callable[[torch.Tensor], torch.Tensor],
        prefix: int,
        width: int,
    ) -> None:
        super().__init__()
        self.model, self.preprocess, self.tokens = model, preprocess, tokens
        self.prefix, self.width = prefix, width

    def forward(self, media: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = self.preprocess(media)
        tokens = self.tokens(pixels.to(next(self.model.parameters()).dtype))
        return tokens[:, 0], tokens[:, self.prefix :]


def _from_transformers(folder: Path, source: str, size: tuple[int, int] | None) -> Backbone:
    from transformers import AutoImageProcessor, AutoModel

    model, found = AutoModel.from_pretrained(folder, output_loading_info=True)
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))  # which is not used
    if missing:
        raise RewardError(f"weights {source!r} lack {len(missing)} tensors of {type(model).__name__}: {missing[:3]}")
    if not (folder / "preprocessor_config.json").is_file():
        raise on_disk.MissingWeights(f"weights {source!r} ({folder}) lack preprocessor_config.json")
    processor = AutoImageProcessor.from_pretrained(folder)
    options: dict[str, Any] = {"do_rescale": False, "return_tensors": "pt"}
    if size is not None:
        options |= {"do_resize": True, "size": {"height": size[0], "width": size[1]}, "do_center_crop": False}

    def preprocess(media: torch.Tensor) -> torch.Tensor:
        return processor(images=media, **options)["pixel_values"]

    def tokens(pixels: torch.Tensor) -> torch.Tensor:
        return model(pixel_values=pixels).last_hidden_state

    config = model.config.to_dict()
    return Backbone(model, preprocess, tokens, 1 + config.get("num_register_tokens", 0), config["hidden_size"])


def _from_timm(folder: Path, source: str, size: tuple[int, int] | None) -> Backbone:
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    own: dict[str, Any] = {} if size is None else {"img_size": size}
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, **own)
    if model.num_prefix_tokens < 1:
        raise RewardError(f"weights {source!r} ({type(model).__name__}) have no class token; expected a DINO ViT")
    data = resolve_model_data_config(model)
    if size is not None:
        data |= {"input_size": (3, *size), "crop_pct": 1.0, "crop_mode": "squash"}
    transform: Any = create_transform(**data, is_training=False)
    return Backbone(model, transform, model.forward_features, model.num_prefix_tokens, model.num_features)


def tiny_dinov2(folder: Path) -> Path:
    """Random weights of a tiny Dinov2 and its image processor's configuration, in the published layout."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    random_network(lambda: Dinov2Model(config)).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 64},
        crop_size={"height": 56, "width": 56},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    return folder
