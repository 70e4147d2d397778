"""Stage `vae`: teach the 4x autoencoder to redraw signs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world
from components import build_vae, single_frame_convolutions
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

BATCH = 32
PEAK_LR, LAST_LR, WARMUP_STEPS = 2e-3, 2e-5, 50
KL_WEIGHT = (
    3e-4  # against the mean squared error in [-1, 1]; leaves a posterior noise that flow errors resemble
)
SAVE_SECONDS = 60


def pixels_of(signs: list[world.Sign]) -> torch.Tensor:
    """Signs as (B, 3, 1, H, W) in [-1, 1]."""
    pictures = np.stack([world.draw(sign) for sign in signs])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1


def batch_of_signs(seed: int, step: int, size: int = BATCH) -> torch.Tensor:
    rng = np.random.default_rng([seed, 1, step])
    return pixels_of([world.pretraining_pair(rng, world.WIDE)[1] for _ in range(size)])


def reconstruction_loss(
    vae: AutoencoderKLQwenImage, pixels: torch.Tensor, rng: torch.Generator
) -> torch.Tensor:
    posterior = vae.encode(pixels).latent_dist
    redrawn = vae.decode(posterior.sample(rng)).sample
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return F.mse_loss(redrawn, pixels) + KL_WEIGHT * kl


def learning_rate(step: int, done: float) -> float:
    """Warm-up, then a cosine over the share of the time budget that is spent."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (
        LAST_LR + (PEAK_LR - LAST_LR) * 0.5 * (1 + math.cos(math.pi * done))
    )


@torch.no_grad()
def psnr(vae: AutoencoderKLQwenImage, pixels: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of reconstructions from the posterior mean."""
    redrawn = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    return 10 * math.log10(4 / F.mse_loss(redrawn, pixels).item())


@torch.no_grad()
def clear_unreached_weights(vae: AutoencoderKLQwenImage) -> None:
    """Zero the temporal slices that a single frame multiplies with zero padding: they were never trained."""
    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.weight[:, :, :-1] = 0


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLQwenImage, pixels: torch.Tensor) -> tuple[list[float], list[float]]:
    """(mean, std) of each latent channel, for the config that the pipeline un-normalises with."""
    mean = vae.encode(pixels).latent_dist.mean
    return mean.mean(dim=(0, 2, 3, 4)).tolist(), mean.std(dim=(0, 2, 3, 4)).tolist()


def fit(
    vae: AutoencoderKLQwenImage,
    loss_at: Callable[[int], torch.Tensor],
    checkpoint: Path,
    seed: int,
    minutes: float,
) -> None:
    """Minimise `loss_at(step)` over all parameters for `minutes` of wall time.

    `checkpoint` is written every minute; where it exists, training goes on from it and its time counts.
    """
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.0)
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    began = saved = time.monotonic()
    test_pixels = batch_of_signs(seed + 1, 0, 128)

    def save() -> None:
        minute = (spent + time.monotonic() - began) / 60
        state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state | {"spent": 60 * minute}, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)
        print(f"vae {minute:.1f} min step {step} psnr {psnr(vae, test_pixels):.2f}", flush=True)

    while (done := (spent + time.monotonic() - began) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, done)
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if time.monotonic() - saved > SAVE_SECONDS:
            saved = time.monotonic()
            save()
    save()


def train_vae(out: Path, seed: int, minutes: float) -> None:
    """Train encoder and decoder together and save `out/vae`, its latent statistics in its config."""
    torch.manual_seed(seed)
    vae = build_vae()

    def loss_at(step: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return reconstruction_loss(vae, batch_of_signs(seed, step), rng)

    with single_frame_convolutions(vae):
        fit(vae, loss_at, out / "vae.pt", seed, minutes)
    clear_unreached_weights(vae)
    mean, std = latent_statistics(vae, batch_of_signs(seed + 2, 0, 512))
    finished = build_vae(mean, std)
    finished.load_state_dict(vae.state_dict())
    finished.save_pretrained(out / "vae")
