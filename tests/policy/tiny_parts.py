"""What several tiny pipelines share: autoencoders, pictures, and the re-drawing of every parameter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def redraw(module: torch.nn.Module, seed: int) -> None:
    """Draw every parameter anew: zero-initialised outputs and gates would hide a wrong input.

    Matrices get std 1/sqrt(fan in), kept in [0.05, 0.3], vectors that were all ones (norm weights) stay
    around 1, other vectors get std 0.1. Values that a constructor left uninitialised are replaced too.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if parameter.ndim < 2:
                centre = 1.0 if bool((parameter == 1).all()) else 0.0
                parameter.copy_(centre + 0.1 * noise)
            else:
                fan_in = math.prod(parameter.shape[1:])
                parameter.copy_(noise * min(0.3, max(0.05, fan_in**-0.5)))


def finish(pipe: DiffusionPipeline, seed: int = 0) -> DiffusionPipeline:
    """Redraw every module of the pipeline, put all in evaluation mode, and silence its progress bar."""
    for number, name in enumerate(sorted(pipe.components)):
        module = pipe.components[name]
        if isinstance(module, torch.nn.Module):
            redraw(module.eval(), seed + number)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed: int = 0, size: int = 32) -> PIL.Image.Image:
    """A random RGB picture, size x size."""
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def flow_euler(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    """The rectified-flow Euler scheduler most pipelines ship with."""
    return FlowMatchEulerDiscreteScheduler(**config)


def kl_vae(latent_channels: int = 4, blocks: int = 2, quant: bool = False, **config: Any) -> AutoencoderKL:
    """A KL autoencoder that shrinks a picture 2 ** (blocks - 1) times."""
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=32,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        **config,
    )
