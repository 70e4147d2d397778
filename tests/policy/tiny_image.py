"""Tiny text-to-image pipelines: real classes, random weights."""

# fmt: off
# A configuration stays a few lines long.

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from tests.policy import tiny_text as text
from tests.policy.tiny_parts import finish, flow_euler, kl_vae

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def unet(in_channels: int = 4) -> UNet2DConditionModel:
    """The shape of the SD 1.5 denoiser in two small blocks."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=in_channels, out_channels=4, block_out_channels=(8, 16),
        layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text.WIDTH, attention_head_dim=4, norm_num_groups=2,
    )


def ddim() -> DDIMScheduler:
    return DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def sd15(scheduler: SchedulerMixin | None = None) -> StableDiffusionPipeline:
    return finish(
        StableDiffusionPipeline(
            vae=kl_vae(quant=True, scaling_factor=0.18215), text_encoder=text.clip(),
            tokenizer=text.clip_tokenizer(), unet=unet(), scheduler=scheduler or ddim(), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )
    )


def sd15_pndm() -> StableDiffusionPipeline:
    """With the published scheduler, which visits its second timestep twice."""
    return sd15(PNDMScheduler(**SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1))


def sd15_controlnet() -> StableDiffusionControlNetPipeline:
    controlnet = ControlNetModel(
        in_channels=4, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=text.WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4, norm_num_groups=2,
        conditioning_embedding_out_channels=(8, 16),
    )
    return finish(
        StableDiffusionControlNetPipeline(
            vae=kl_vae(quant=True, scaling_factor=0.18215), text_encoder=text.clip(),
            tokenizer=text.clip_tokenizer(), unet=unet(), controlnet=controlnet, scheduler=ddim(),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )
    )


def sdxl() -> StableDiffusionXLPipeline:
    denoiser = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8, 16),
        layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * text.WIDTH, attention_head_dim=(2, 4), norm_num_groups=2,
        use_linear_projection=True, transformer_layers_per_block=(1, 1), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + text.WIDTH,
    )
    return finish(
        StableDiffusionXLPipeline(
            vae=kl_vae(quant=True, scaling_factor=0.13025), text_encoder=text.clip(),
            text_encoder_2=text.clip(projection=True), tokenizer=text.clip_tokenizer(),
            tokenizer_2=text.clip_tokenizer(), unet=denoiser, add_watermarker=False,
            scheduler=EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading"),
        )
    )


def sd3_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=2 * text.WIDTH,
        pooled_projection_dim=2 * text.WIDTH, pos_embed_max_size=16, qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )


def sd3() -> StableDiffusion3Pipeline:
    return finish(
        StableDiffusion3Pipeline(
            transformer=sd3_transformer(), scheduler=flow_euler(shift=3.0),
            vae=kl_vae(scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=text.clip(projection=True), tokenizer=text.clip_tokenizer(),
            text_encoder_2=text.clip(projection=True), tokenizer_2=text.clip_tokenizer(),
            text_encoder_3=text.t5(2 * text.WIDTH), tokenizer_3=text.t5_tokenizer(),
        )
    )


def flux_transformer(in_channels: int = 16, out_channels: int | None = None) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=in_channels, out_channels=out_channels, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=text.WIDTH,
        pooled_projection_dim=text.WIDTH, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )


def flux_parts() -> dict[str, Any]:
    """Everything of FLUX.1 but the transformer."""
    return {
        "vae": kl_vae(scaling_factor=0.3611, shift_factor=0.1159),
        "text_encoder": text.clip(), "tokenizer": text.clip_tokenizer(),
        "text_encoder_2": text.t5(), "tokenizer_2": text.t5_tokenizer(),
        "scheduler": flow_euler(shift=3.0, use_dynamic_shifting=True),
    }


def flux() -> FluxPipeline:
    return finish(FluxPipeline(transformer=flux_transformer(), **flux_parts()))


def flux_kontext() -> FluxKontextPipeline:
    return finish(FluxKontextPipeline(transformer=flux_transformer(), **flux_parts()))


def qwen_vae() -> AutoencoderKLQwenImage:
    """Shrinks a picture 4 times."""
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.1, 0.2, 0.0], latents_std=[1.1, 0.9, 1.0, 1.2],
    )


def qwen_transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=text.WIDTH, axes_dims_rope=(8, 4, 4),
    )


def qwen_image() -> QwenImagePipeline:
    schedule = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    return finish(
        QwenImagePipeline(
            transformer=qwen_transformer(), vae=qwen_vae(), text_encoder=text.qwen_vl(),
            tokenizer=text.qwen_tokenizer(), scheduler=flow_euler(use_dynamic_shifting=True, **schedule),
        )
    )
