"""The generator's five components, tiny: Qwen-Image's own classes with our sizes, and a tokenizer of our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from world import COLOURS

LATENT_CHANNELS = 8
TEXT_WIDTH = 64

# Every word of Qwen-Image's prompt template and of ours becomes one token, so that the pipeline's
# `prompt_template_encode_start_idx` (34) drops exactly the template's opening.
TEMPLATE_TEXT = (
    "the image by detailing color shape size texture quantity text spatial relationships of objects and background "
    "sign that says"
)
TEMPLATE_WORDS = (
    "system",
    "Describe",
    "user",
    "assistant",
    *(f"Ġ{word}" for word in TEMPLATE_TEXT.split(" ")),
)
PADDING_TOKEN = "<|endoftext|>"
CHAT_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def _byte_symbols() -> list[str]:
    """The 256 printable symbols of byte-level BPE, in byte order (GPT-2's table, which Qwen2 uses)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in printable)
    table = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [table[b] for b in range(256)]


def build_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE whose only merges spell the template's words and the colours: a capital letter is one token."""
    words = [*TEMPLATE_WORDS, *(f"Ġ{colour}" for colour in COLOURS), 'Ġ"']
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            if pair not in merges:
                merges.append(pair)
    symbols = [*_byte_symbols(), *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(symbols))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=1058)
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHAT_TOKENS)})
    return tokenizer


def build_vae(
    latents_mean: list[float] | None = None, latents_std: list[float] | None = None
) -> AutoencoderKLQwenImage:
    """A 4x autoencoder: (B, 3, 1, H, W) in [-1, 1] to (B, 8, 1, H/4, W/4) and back."""
    return AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        latents_mean=latents_mean or [0.0] * LATENT_CHANNELS,
        latents_std=latents_std or [1.0] * LATENT_CHANNELS,
    )


def build_transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Two language layers and one vision layer; token embeddings of unit scale, so that the last hidden state is
    informative from the first step on (the class's own 0.02 is not)."""
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 2 * TEXT_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token(PADDING_TOKEN),
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "window_size": 32,
            "out_hidden_size": TEXT_WIDTH,
            "fullatt_block_indexes": [0],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0)
    return encoder


def build_pipeline(vae: AutoencoderKLQwenImage) -> QwenImagePipeline:
    """A pipeline around `vae`, otherwise untrained."""
    tokenizer = build_tokenizer()
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=build_transformer(),
    )


def _last_slice_convolution(
    conv: QwenImageCausalConv3d, x: torch.Tensor, cache_x: None = None
) -> torch.Tensor:
    weight = conv.weight[:, :, -1]
    pad = weight.shape[-1] // 2
    return F.conv2d(x[:, :, 0], weight, conv.bias, padding=pad)[:, :, None]


@contextmanager
def single_frame_convolutions(vae: AutoencoderKLQwenImage) -> Iterator[None]:
    """Inside, the causal 3-D convolutions of this `vae` run as 2-D ones: for one frame the same function, since the
    two earlier frames are zero padding, at a third of the work. One frame only."""
    convolutions = [m for m in vae.modules() if isinstance(m, QwenImageCausalConv3d)]
    for conv in convolutions:
        conv.forward = MethodType(_last_slice_convolution, conv)
    try:
        yield
    finally:
        for conv in convolutions:
            del conv.forward
