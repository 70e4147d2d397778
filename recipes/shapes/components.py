"""The generator's components, tiny: Wan's own classes with our sizes, and a tokenizer of our words."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel
from world import COLOURS, DIRECTIONS, FRAMES, SHAPES

LATENT_CHANNELS = 32
VAE_WIDTH, PATCH = 32, 4
LATENT_FRAMES = (FRAMES - 1) // 2 + 1
TEXT_WIDTH = 64
HEADS, HEAD_WIDTH, LAYERS = 4, 48, 5


def build_vae() -> AutoencoderKLWan:
    """A causal video autoencoder: (B, 3, 1 + 2 n, H, W) in [-1, 1] to (B, 32, 1 + n, H / 8, W / 8) and back.

    Every residual branch starts at zero: without, tiny objects stay unlearnt for thousands of steps."""
    vae = AutoencoderKLWan(
        base_dim=VAE_WIDTH,
        decoder_base_dim=VAE_WIDTH,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        scale_factor_temporal=2,
        scale_factor_spatial=2 * PATCH,
    )
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return vae


def build_transformer() -> WanTransformer3DModel:
    """One token is 8 x 8 pixels over the whole clip, so that the way a shape moves is in every token that it crosses.
    With a token for every latent frame, the motion had not been learnt when shapes and colours long were."""
    transformer = WanTransformer3DModel(
        patch_size=(LATENT_FRAMES, 1, 1),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=4 * HEADS * HEAD_WIDTH,
        num_layers=LAYERS,
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def build_tokenizer() -> T5Tokenizer:
    """A unigram model whose only pieces are the words of the world; every other word is one unknown token."""
    words = dict.fromkeys(word for part in ("a", *COLOURS, *SHAPES, *DIRECTIONS) for word in part.split())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *((f"▁{word}", -2.0) for word in words)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def build_text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """Two layers; token embeddings of unit scale, so that hidden states are informative from the first step on."""
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    encoder = UMT5EncoderModel(config)
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0)
    return encoder


def build_pipeline(vae: AutoencoderKLWan) -> WanPipeline:
    """A pipeline around `vae`, otherwise untrained."""
    tokenizer = build_tokenizer()
    return WanPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=build_transformer(),
    )
