"""Tiny video pipelines: real classes, random weights."""

# fmt: off
# A configuration stays a few lines long.

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

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


def wan_t2v(scheduler: SchedulerMixin | None = None) -> WanPipeline:
    return finish(
        WanPipeline(
            tokenizer=text.t5_tokenizer(), text_encoder=text.t5(), vae=wan_vae(), transformer=wan_transformer(),
            scheduler=scheduler or flow_euler(shift=3.0),
        )
    )


def unipc() -> UniPCMultistepScheduler:
    """The multistep solver that Wan is published with."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def wan_t2v_unipc() -> WanPipeline:
    return wan_t2v(unipc())


def wan_two_experts() -> WanPipeline:
    """Wan 2.2: one expert above the boundary, another below."""
    return finish(
        WanPipeline(
            tokenizer=text.t5_tokenizer(), text_encoder=text.t5(), vae=wan_vae(), transformer=wan_transformer(),
            transformer_2=wan_transformer(), boundary_ratio=0.7, scheduler=flow_euler(shift=3.0),
        )
    )


def wan_i2v() -> WanImageToVideoPipeline:
    encoder, processor = text.clip_vision()
    return finish(
        WanImageToVideoPipeline(
            tokenizer=text.t5_tokenizer(), text_encoder=text.t5(), vae=wan_vae(), scheduler=flow_euler(shift=3.0),
            transformer=wan_transformer(in_channels=4 + 4 + 4, image_dim=text.WIDTH),
            image_encoder=encoder, image_processor=processor,
        )
    )


def ltx_vae() -> AutoencoderKLLTXVideo:
    """Shrinks 4 times in space and time; its latent statistics are buffers."""
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1, patch_size_t=1,
        spatio_temporal_scaling=(True, True, False, False), encoder_causal=True, decoder_causal=False,
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False,
    )
    rng = torch.Generator().manual_seed(1)
    vae.latents_mean.copy_(0.2 * torch.randn(8, generator=rng))
    vae.latents_std.copy_(1 + torch.rand(8, generator=rng))
    return vae


def _ltx(kind: type[LTXPipeline] | type[LTXImageToVideoPipeline]) -> LTXPipeline | LTXImageToVideoPipeline:
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=2, caption_channels=text.WIDTH,
    )
    return finish(
        kind(
            tokenizer=text.t5_tokenizer(), text_encoder=text.t5(), vae=ltx_vae(), transformer=transformer,
            scheduler=flow_euler(shift=1.0, use_dynamic_shifting=True, shift_terminal=0.1, max_shift=2.05),
        )
    )


def ltx_t2v() -> LTXPipeline:
    return _ltx(LTXPipeline)


def ltx_i2v() -> LTXImageToVideoPipeline:
    return _ltx(LTXImageToVideoPipeline)


def hunyuan_video() -> HunyuanVideoPipeline:
    blocks = 4
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=text.WIDTH, pooled_projection_dim=text.WIDTH, rope_axes_dim=(2, 4, 4),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * blocks,
        up_block_types=("HunyuanVideoUpBlock3D",) * blocks, block_out_channels=(8,) * blocks, layers_per_block=1,
        norm_num_groups=4, scaling_factor=0.476986, spatial_compression_ratio=8, temporal_compression_ratio=4,
    )
    return finish(
        HunyuanVideoPipeline(
            transformer=transformer, vae=vae, text_encoder=text.llama(), tokenizer=text.llama_tokenizer(),
            text_encoder_2=text.clip(length=77), tokenizer_2=text.clip_tokenizer(77),
            scheduler=flow_euler(shift=7.0),
        )
    )


def cogvideox_vae() -> AutoencoderKLCogVideoX:
    blocks = 4
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * blocks, up_block_types=("CogVideoXUpBlock3D",) * blocks,
        block_out_channels=(8,) * blocks, latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4, scaling_factor=0.7,
    )


def cogvideox_transformer(in_channels: int = 4, rotary: bool = False) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=in_channels, out_channels=4, time_embed_dim=8,
        text_embed_dim=text.WIDTH, num_layers=1, sample_width=4, sample_height=4, sample_frames=5, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=16, use_rotary_positional_embeddings=rotary,
        use_learned_positional_embeddings=rotary,
    )


def cogvideox_ddim() -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing"
    )


def cogvideox_t2v() -> CogVideoXPipeline:
    return finish(
        CogVideoXPipeline(
            tokenizer=text.t5_tokenizer(), text_encoder=text.t5(), vae=cogvideox_vae(),
            transformer=cogvideox_transformer(), scheduler=cogvideox_ddim(),
        )
    )


def cogvideox_i2v() -> CogVideoXImageToVideoPipeline:
    return finish(
        CogVideoXImageToVideoPipeline(
            tokenizer=text.t5_tokenizer(), text_encoder=text.t5(), vae=cogvideox_vae(),
            transformer=cogvideox_transformer(8, rotary=True), scheduler=cogvideox_ddim(),
        )
    )
