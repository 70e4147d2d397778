"""The generator's components, tiny: LTX-Video's own classes with our sizes, and a tokenizer of our words."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer
from world import COLOURS, DIRECTIONS, SHAPES

LATENT_CHANNELS = 32
VAE_WIDTHS = (32, 64)
TEXT_WIDTH = 64
WIDTH, HEADS, LAYERS = 128, 4, 5


def build_vae() -> AutoencoderKLLTXVideo:
    """LTX-Video 0.9.5's autoencoder, causal both ways: (B, 3, 1 + 2 n, H, W) in [-1, 1] to (B, 32, 1 + n, H / 8, W / 8)
    and back. Every residual branch starts at zero, so that what is left is a linear patch code: without, tiny objects
    stay unlearnt for thousands of steps."""
    vae = AutoencoderKLLTXVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=VAE_WIDTHS,
        decoder_block_out_channels=VAE_WIDTHS[1:],
        down_block_types=("LTXVideo095DownBlock3D",),
        downsample_type=("spatiotemporal",),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        upsample_residual=(True,),
        upsample_factor=(2,),
        patch_size=4,
        encoder_causal=True,
        decoder_causal=True,
    )
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv3d):
            torch.nn.init.zeros_(module.bias)
            if any(part in name for part in ("conv2", "downsamplers", "upsamplers")):
                torch.nn.init.zeros_(module.weight)
    return vae


def build_transformer() -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        cross_attention_dim=WIDTH,
        num_layers=LAYERS,
        caption_channels=TEXT_WIDTH,
    )


def build_tokenizer() -> T5Tokenizer:
    """A unigram model whose only pieces are the words of the world; every other word is one unknown token."""
    words = dict.fromkeys(word for part in ("a", *COLOURS, *SHAPES, *DIRECTIONS) for word in part.split())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *((f"▁{word}", -2.0) for word in words)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def build_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Two layers; token embeddings of unit scale, so that hidden states are informative from the first step on."""
    config = T5Config(
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
    encoder = T5EncoderModel(config)
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0)
    return encoder


def build_pipeline(vae: AutoencoderKLLTXVideo) -> LTXPipeline:
    """A pipeline around `vae`, otherwise untrained."""
    tokenizer = build_tokenizer()
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=build_transformer(),
    )
