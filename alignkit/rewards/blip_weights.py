"""The names of BLIP's tensors as ImageReward publishes them, and as transformers calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# Published (salesforce/BLIP on timm's vision transformer), transformers. In this order, each replaced where it occurs.
VISION = (
    ("blip.visual_encoder.blocks.", "vision.encoder.layers."),
    ("blip.visual_encoder.patch_embed.proj.", "vision.embeddings.patch_embedding."),
    ("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
    ("blip.visual_encoder.norm.", "vision.post_layernorm."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)
TEXT = (("blip.text_encoder.", "text."),)
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")

TINY: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "encoder_width": 64,
    "add_cross_attention": True,
}


def to_transformers(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published tensors under transformers' names; those of the contrastive head are left out."""
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(UNUSED)}
    return {_renamed(name, VISION + TEXT): tensor for name, tensor in kept.items()}


def to_published(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The opposite; the contrastive head is not made up."""
    backwards = tuple((new, old) for old, new in VISION + TEXT)
    order = sorted(backwards, key=lambda pair: pair[0].startswith("vision."))  # parts of a layer before its prefix
    return {_renamed(name, order) if name.startswith(("vision.", "text.")) else name: t for name, t in state.items()}


def _renamed(name: str, pairs: Any) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def vision_config(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Sizes of the image encoder, which no configuration publishes, from its tensors under transformers' names.

    A vision transformer's heads are 64 wide (2010.11929), which the tensors do not show.
    """
    weight = state.get("vision.embeddings.patch_embedding.weight", torch.empty(1024, 3, 16, 16))
    positions = state.get("vision.embeddings.position_embedding", torch.empty(1, 197, 1024))
    layers = {name.split(".")[3] for name in state if name.startswith("vision.encoder.layers.")}
    first = state.get("vision.encoder.layers.0.mlp.fc1.weight", torch.empty(4096, 1024))
    hidden, patch = weight.shape[0], weight.shape[-1]
    return {
        "hidden_size": hidden,
        "intermediate_size": first.shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": hidden // 64,
        "patch_size": patch,
        "image_size": patch * round((positions.shape[1] - 1) ** 0.5),
    }
