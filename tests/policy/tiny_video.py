"""Tiny video pipelines: real classes, random weights."""

# fmt: off
# A configuration stays a few lines long.

from __future__ import annotations

from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

from tests.policy import tiny_text as text
from tests.policy.tiny_parts import finish, flow_euler


def wan_vae() -> AutoencoderKLWan:
    """Shrinks 8 times in space and 4 times in time."""
    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.1, 0.2, 0.0], latents_std=[1.1, 0.9, 1.0, 1.2],
    )


def wan_transformer(in_channels: int = 4, image_dim: int | None = None) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=in_channels,
        out_channels=4, text_dim=text.WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32, image_dim=image_dim,
    )


def wan_t2v() -> WanPipeline:
    return finish(
        WanPipeline(
            tokenizer=text.t5_tokenizer(), text_encoder=text.t5(), vae=wan_vae(),
            transformer=wan_transformer(), scheduler=flow_euler(shift=3.0),
        )
    )
