"""Tiny pipelines beyond the required list: editing, inpainting, control, and further video families."""

from __future__ import annotations

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLTemporalDecoder,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FluxFillPipeline,
    LattePipeline,
    LatteTransformer3DModel,
    MotionAdapter,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)

from tests.policy import tiny_image as image
from tests.policy import tiny_text as text
from tests.policy import tiny_video as video
from tests.policy.tiny_parts import finish, flow_euler, kl_vae

# fmt: off
# A configuration stays a few lines long.


def flux_fill() -> FluxFillPipeline:
    transformer = image.flux_transformer(in_channels=16 + 16 + 4 * 4, out_channels=16)
    return finish(FluxFillPipeline(transformer=transformer, **image.flux_parts()))


def chroma() -> ChromaPipeline:
    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=text.WIDTH, axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16,
    )
    parts = {k: v for k, v in image.flux_parts().items() if k in ("vae", "scheduler")}
    return finish(
        ChromaPipeline(transformer=transformer, text_encoder=text.t5(), tokenizer=text.t5_tokenizer(), **parts)
    )


def omnigen() -> OmniGenPipeline:
    transformer = OmniGenTransformer2DModel(
        in_channels=4, hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32,
        num_layers=2, time_step_dim=4, pos_embed_max_size=32, vocab_size=512, pad_token_id=0,
        rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
    )
    return finish(
        OmniGenPipeline(
            transformer=transformer, vae=kl_vae(blocks=4, quant=True, scaling_factor=0.13025),
            tokenizer=text.llama_tokenizer(),
            scheduler=flow_euler(invert_sigmas=True, num_train_timesteps=1),
        )
    )


def sd3_controlnet() -> StableDiffusion3ControlNetPipeline:
    controlnet = SD3ControlNetModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=2 * text.WIDTH, pooled_projection_dim=2 * text.WIDTH,
        out_channels=4, pos_embed_max_size=16,
    )
    parts = {k: v for k, v in image.sd3().components.items() if k not in ("image_encoder", "feature_extractor")}
    parts["transformer"] = image.sd3_transformer()
    pipe = StableDiffusion3ControlNetPipeline(controlnet=controlnet, **parts)
    return finish(pipe)


def _sd15_parts(in_channels: int = 4) -> dict[str, object]:
    return {
        "vae": kl_vae(quant=True, scaling_factor=0.18215), "text_encoder": text.clip(),
        "tokenizer": text.clip_tokenizer(), "unet": image.unet(in_channels), "scheduler": image.ddim(),
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }


def sd15_inpaint() -> StableDiffusionInpaintPipeline:
    """Mask and masked picture are channels of the denoiser's input."""
    return finish(StableDiffusionInpaintPipeline(**_sd15_parts(9)))


def sd15_inpaint_blend() -> StableDiffusionInpaintPipeline:
    """A plain denoiser: the loop writes the known part over the latents after every step."""
    return finish(StableDiffusionInpaintPipeline(**_sd15_parts()))


def sd15_img2img() -> StableDiffusionImg2ImgPipeline:
    """Starts late in the grid, from the noised picture."""
    return finish(StableDiffusionImg2ImgPipeline(**_sd15_parts()))


def svd() -> StableVideoDiffusionPipeline:
    encoder, processor = text.clip_vision()
    unet = UNetSpatioTemporalConditionModel(
        sample_size=16, in_channels=8, out_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=text.WIDTH, num_attention_heads=2, addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    scheduler = EulerDiscreteScheduler(
        **image.SD_BETAS, prediction_type="v_prediction", sigma_max=700.0, sigma_min=0.002,
        timestep_type="continuous", timestep_spacing="leading", use_karras_sigmas=True, steps_offset=1,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        layers_per_block=1,
    )
    return finish(
        StableVideoDiffusionPipeline(
            vae=vae, image_encoder=encoder, unet=unet, scheduler=scheduler, feature_extractor=processor
        )
    )


def animatediff() -> AnimateDiffPipeline:
    adapter = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2
    )
    return finish(
        AnimateDiffPipeline(
            vae=kl_vae(quant=True, scaling_factor=0.18215), text_encoder=text.clip(),
            tokenizer=text.clip_tokenizer(), unet=image.unet(), motion_adapter=adapter, scheduler=image.ddim(),
        )
    )


def latte() -> LattePipeline:
    transformer = LatteTransformer3DModel(
        sample_size=16, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, caption_channels=text.WIDTH, cross_attention_dim=16, attention_bias=True, video_length=2,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    )
    return finish(
        LattePipeline(
            transformer=transformer, vae=kl_vae(quant=True, scaling_factor=0.18215), text_encoder=text.t5(),
            tokenizer=text.t5_tokenizer(), scheduler=image.ddim(),
        )
    )


def sana_video() -> SanaVideoPipeline:
    transformer = SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
        caption_channels=text.WIDTH, sample_size=8, patch_size=(1, 2, 2), rope_max_seq_len=32,
    )
    return finish(
        SanaVideoPipeline(
            transformer=transformer, vae=video.wan_vae(), text_encoder=text.gemma(),
            tokenizer=text.gemma_tokenizer(),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )
    )


def masks(count: int, size: int = 32) -> torch.Tensor:
    """(count, 1, size, size): the right half of each is to be painted."""
    painted = torch.zeros(count, 1, size, size)
    painted[..., size // 2 :] = 1
    return painted
