"""More tiny text-to-image pipelines: real classes, random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DPMSolverMultistepScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import ByT5Tokenizer

from tests.policy import tiny_text as text
from tests.policy.tiny_parts import finish, flow_euler, kl_vae

# fmt: off
# A configuration stays a few lines long.


def flux2() -> Flux2Pipeline:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=2,
        sample_size=32, use_quant_conv=False, use_post_quant_conv=False,
    )
    rng = torch.Generator().manual_seed(1)
    vae.bn.running_mean.copy_(0.2 * torch.randn(16, generator=rng))  # the latents' statistics are buffers here
    vae.bn.running_var.copy_(1 + torch.rand(16, generator=rng))
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=3 * text.WIDTH, timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return finish(
        Flux2Pipeline(
            transformer=transformer, vae=vae, text_encoder=text.mistral(), tokenizer=text.mistral_tokenizer(),
            scheduler=flow_euler(shift=3.0, use_dynamic_shifting=True),
        )
    )


def z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=text.WIDTH, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )
    return finish(
        ZImagePipeline(
            transformer=transformer, vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=text.qwen3(), tokenizer=text.qwen_tokenizer(), scheduler=flow_euler(shift=3.0),
        )
    )


def sana_vae() -> AutoencoderDC:
    """Shrinks a picture 2 times, deterministically."""
    kinds = ("ResBlock", "EfficientViTBlock")
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=kinds, decoder_block_types=kinds,
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    )


def sana(scheduler: SchedulerMixin | None = None) -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=text.WIDTH, sample_size=16,
    )
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return finish(
        SanaPipeline(
            transformer=transformer, vae=sana_vae(), text_encoder=text.gemma(), tokenizer=text.gemma_tokenizer(),
            scheduler=scheduler or solver,
        )
    )


def sana_euler() -> SanaPipeline:
    """Sana with the scheduler that diffusers' tests give it."""
    return sana(flow_euler(shift=3.0))


def pixart() -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, caption_channels=text.WIDTH, cross_attention_dim=16, use_additional_conditions=False,
    )
    return finish(
        PixArtSigmaPipeline(
            transformer=transformer, vae=kl_vae(quant=True, scaling_factor=0.13025), text_encoder=text.t5(),
            tokenizer=text.t5_tokenizer(), scheduler=DPMSolverMultistepScheduler(),
        )
    )


def auraflow() -> AuraFlowPipeline:
    transformer = AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=text.WIDTH,
        pos_embed_max_size=64,
    )
    return finish(
        AuraFlowPipeline(
            transformer=transformer, vae=kl_vae(quant=True, scaling_factor=0.13025), text_encoder=text.umt5(),
            tokenizer=text.llama_tokenizer("<pad>"), scheduler=flow_euler(shift=1.73),
        )
    )


def cogview4() -> CogView4Pipeline:
    transformer = CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=text.WIDTH, time_embed_dim=8, condition_dim=4, sample_size=16, rope_axes_dim=(16, 16),
    )
    shift = {"base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear", "use_dynamic_shifting": True}
    return finish(
        CogView4Pipeline(
            transformer=transformer, vae=kl_vae(), text_encoder=text.glm(),
            tokenizer=text.llama_tokenizer("<pad>", padding_side="left"), scheduler=flow_euler(**shift),
        )
    )


def lumina2() -> Lumina2Pipeline:
    transformer = Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 4), axes_lens=(64, 32, 32),
        cap_feat_dim=text.WIDTH,
    )
    return finish(
        Lumina2Pipeline(  # it assumes an autoencoder that shrinks 8 times
            transformer=transformer, vae=kl_vae(blocks=4, scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=text.gemma(), tokenizer=text.gemma_tokenizer(), scheduler=flow_euler(shift=6.0),
        )
    )


def hunyuan_image() -> HunyuanImagePipeline:
    """HunyuanImage 2.1 with projected guidance from step 3 on, without the momentum of the published guider."""
    return _hunyuan_image(False, _guider(2), _guider(6))


def hunyuan_image_momentum() -> HunyuanImagePipeline:
    """As published: what guidance returns depends on the steps before, so no one-step call can give it."""
    return _hunyuan_image(False, _guider(2, momentum=-0.5), _guider(6, momentum=-0.5))


def hunyuan_image_distilled() -> HunyuanImagePipeline:
    return _hunyuan_image(True, None, None)


def _guider(start: int, momentum: float | None = None) -> AdaptiveProjectedMixGuidance:
    return AdaptiveProjectedMixGuidance(
        guidance_scale=4.0, adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_start_step=start,
    )


def _hunyuan_image(distilled: bool, guider: Any, ocr_guider: Any) -> HunyuanImagePipeline:
    pipe = HunyuanImagePipeline(
        transformer=hunyuan_image_transformer(distilled), vae=hunyuan_image_vae(), text_encoder=text.qwen_vl(),
        tokenizer=text.qwen_tokenizer(), text_encoder_2=text.t5(vocabulary=len(ByT5Tokenizer())),
        tokenizer_2=ByT5Tokenizer(), scheduler=flow_euler(shift=5.0), guider=guider, ocr_guider=ocr_guider,
    )
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 16, 16  # the attributes that stand for 1000 and 128
    return finish(pipe)


def hunyuan_image_transformer(distilled: bool) -> HunyuanImageTransformer2DModel:
    return HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=(1, 1), guidance_embeds=distilled, use_meanflow=distilled,
        text_embed_dim=text.WIDTH, text_embed_2_dim=text.WIDTH, rope_axes_dim=(4, 4),
    )


def hunyuan_image_vae() -> AutoencoderKLHunyuanImage:
    return AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32, 32), layers_per_block=1,
        scaling_factor=0.75, spatial_compression_ratio=8, sample_size=32,
    )
