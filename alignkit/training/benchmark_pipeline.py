"""The pipeline of the benchmark: a tiny SD 3 with random weights, built from the configurations below."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3 import StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

WIDTH, TEXT_WIDTH, TEXT_LENGTH = 256, 64, 16

TRANSFORMER: Mapping[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 6,
    "attention_head_dim": 64,
    "num_attention_heads": WIDTH // 64,
    "caption_projection_dim": WIDTH,
    "joint_attention_dim": 2 * TEXT_WIDTH,
    "pooled_projection_dim": 2 * TEXT_WIDTH,
    "pos_embed_max_size": 32,
    "qk_norm": "rms_norm",
}
VAE: Mapping[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5,
    "shift_factor": 0.06,
}


def tiny_sd3() -> StableDiffusion3Pipeline:
    """A complete SD 3 with its three text encoders, random weights; `from_pretrained` loads what it saves."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        first, second, third = _clip(), _clip(), _t5()
        return StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(**TRANSFORMER),
            vae=AutoencoderKL(**VAE),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=first[0],
            tokenizer=first[1],
            text_encoder_2=second[0],
            tokenizer_2=second[1],
            text_encoder_3=third[0],
            tokenizer_3=third[1],  # type: ignore[arg-type]  # annotated as the fast one, which it is
        )


def _clip() -> tuple[CLIPTextModelWithProjection, CLIPTokenizer]:
    """A CLIP text encoder and a tokenizer of single characters."""
    characters = list(bytes_to_unicode().values())
    pieces = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_LENGTH)
    end = vocabulary["<|endoftext|>"]
    config = CLIPTextConfig(
        vocab_size=len(pieces),
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModelWithProjection(config).eval(), tokenizer


def _t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 encoder, twice as wide as CLIP (SD 3 pads CLIP's features to T5's), and a tokenizer of characters."""
    characters = [c for c in string.printable if not c.isspace()]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -4.0), *((c, -4.0) for c in characters)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=2 * TEXT_WIDTH,
        d_kv=32,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config).eval(), tokenizer
