"""Configurations made small: the same classes with few layers, few heads and narrow widths.

Widths of text features are divided by one factor wherever they appear, so that sums and concatenations of several
encoders still fit the denoiser that reads them. Widths of heads stay (rotary embeddings depend on them), their number
shrinks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FACTOR = 16
LAYERS, HEADS = 2, 2

TEXT_WIDTHS = ("hidden_size", "d_model", "projection_dim", "intermediate_size", "d_ff", "out_hidden_size")
READS_TEXT = (
    "joint_attention_dim",
    "pooled_projection_dim",
    "cross_attention_dim",
    "text_dim",
    "text_embed_dim",
    "text_hidden_dim",
    "caption_channels",
    "cap_feat_dim",
    "encoder_hid_dim",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)
FEED_FORWARD = ("ffn_dim", "intermediate_size", "mlp_dim")
LISTS_PER_LAYER = ("layer_types", "dual_attention_layers", "fullatt_block_indexes", "attn_layers")


def text_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """A text or vision-language encoder's configuration, nested ones too."""
    small: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and name.endswith("_config"):
            small[name] = text_encoder(value)
        elif _is_depth(name) and isinstance(value, int):
            small[name] = min(value, LAYERS)
        elif name in TEXT_WIDTHS and isinstance(value, int):
            small[name] = value // FACTOR
        elif name in ("num_attention_heads", "num_key_value_heads", "num_heads") and isinstance(value, int):
            small[name] = 1
        elif name in LISTS_PER_LAYER and isinstance(value, list):
            small[name] = _first_layers(value)
        else:
            small[name] = value
    return _rotary(config, small)


def _rotary(config: Mapping[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Sections of a multimodal rotary embedding add up to half of a head's width."""
    for name in ("rope_parameters", "rope_scaling"):
        sections = (config.get(name) or {}).get("mrope_section")
        if sections is None or "head_dim" in config:
            continue
        half = small["hidden_size"] // small["num_attention_heads"] // 2
        scaled = [section * half // sum(sections) for section in sections]
        scaled[0] += half - sum(scaled)
        small[name] = {**config[name], "mrope_section": scaled}
    return small


def denoiser(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers transformer's or UNet's configuration."""
    if "block_out_channels" in config:
        return _unet(config)
    heads, width = config.get("num_attention_heads"), config.get("attention_head_dim")
    inner = heads * width if isinstance(heads, int) and isinstance(width, int) else None
    small: dict[str, Any] = {}
    for name, value in config.items():
        if _is_depth(name) and isinstance(value, int):
            small[name] = min(value, LAYERS)
        elif name.startswith("num_") and name.endswith("heads") and isinstance(value, int):
            small[name] = min(value, HEADS)
        elif inner is not None and value == inner and name != "in_channels":
            small[name] = min(heads, HEADS) * width  # type: ignore[type-var,operator]
        elif (name in READS_TEXT or name in FEED_FORWARD) and isinstance(value, int):
            small[name] = value // FACTOR
        elif name in LISTS_PER_LAYER and isinstance(value, list | tuple):
            small[name] = _first_layers(list(value))
        else:
            small[name] = value
    return small


def _unet(config: Mapping[str, Any]) -> dict[str, Any]:
    small = {**config, "block_out_channels": scaled_to(config["block_out_channels"], 32), "layers_per_block": 1}
    for name in READS_TEXT:
        if isinstance(config.get(name), int):
            small[name] = config[name] // FACTOR
    heads = config.get("attention_head_dim")
    if isinstance(heads, list | tuple):
        small["attention_head_dim"] = [n // heads[0] for n in heads]
    deep = config.get("transformer_layers_per_block")
    if deep is not None:
        small["transformer_layers_per_block"] = 1 if isinstance(deep, int) else [1] * len(deep)
    return small


def autoencoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """An autoencoder's configuration; latent channels and compression stay."""
    small = dict(config)
    for name in ("block_out_channels", "decoder_block_out_channels"):
        if isinstance(config.get(name), list | tuple):
            small[name] = scaled_to(config[name], 16)
    for name in ("layers_per_block", "decoder_layers_per_block"):
        value = config.get(name)
        if value is not None:
            small[name] = 1 if isinstance(value, int) else [1] * len(value)
    if "norm_num_groups" in config:
        small["norm_num_groups"] = min(config["norm_num_groups"], 8)
    small |= {n: v for n, v in (("base_dim", 8), ("num_res_blocks", 1)) if n in config}
    return small


def scaled_to(channels: list[int] | tuple[int, ...], smallest: int) -> list[int]:
    """Channel counts in the same proportions, the smallest being `smallest`."""
    return [n * smallest // min(channels) for n in channels]


def _is_depth(name: str) -> bool:
    return name == "depth" or (name.startswith(("num_", "n_")) and name.endswith("layers"))


def _first_layers(entries: list[Any]) -> list[Any]:
    """A list with one entry per layer, or a list of layer numbers, for the layers that are left."""
    if all(isinstance(entry, int) for entry in entries):
        return [entry for entry in entries if entry < LAYERS]
    return entries[:LAYERS]
