"""Stage `vae`: teach the causal video autoencoder to redraw clips."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world
from components import build_vae
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from einops import rearrange, reduce
from fitting import Schedule, fit

BATCH = 16
CROWDED = 0.5  # share of the budget in which half of a batch shows many shapes
KL_WEIGHT = 1e-4  # against the mean squared error in [-1, 1]
EMPHASIS = 3.0
FAULTS = replace(world.FREE, jerky=0.3, flickering=0.35)  # more of what is hard to redraw


def as_pixels(clips: list[np.ndarray]) -> torch.Tensor:
    """(T, H, W, 3) uint8 each as (B, 3, T, H, W) in [-1, 1]."""
    return rearrange(torch.from_numpy(np.stack(clips)), "b t h w c -> b c t h w").float() / 127.5 - 1


def pixels_of(clips: list[world.Clip]) -> torch.Tensor:
    """Clips as (B, 3, FRAMES, H, W) in [-1, 1]."""
    return as_pixels([world.draw(clip) for clip in clips])


def batch_of_clips(seed: int, step: int, size: int = BATCH, crowded: bool = False) -> torch.Tensor:
    rng = np.random.default_rng([seed, 1, step])
    crowds = [world.crowd(rng, FAULTS) for _ in range(size // 2 if crowded else 0)]
    drawn = [world.draw(world.pretraining_pair(rng, FAULTS)[1]) for _ in range(size - len(crowds))]
    return as_pixels(crowds + drawn)


def reconstruction_loss(vae: AutoencoderKLWan, pixels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Squared error, a tenth of the absolute error, which keeps edges sharp, and the KL of the posterior. Pixels count
    the more the farther they are from their frame's mean: the ground fills most of a clip. Networks run in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = DiagonalGaussianDistribution(vae.encode(pixels).latent_dist.parameters.float())
        redrawn = vae.decode(posterior.sample(rng)).sample.float()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    weight = 1 + EMPHASIS * (pixels - reduce(pixels, "b c t h w -> b c t 1 1", "mean")).abs()
    off = redrawn - pixels
    return (weight * (off.square() + 0.1 * off.abs())).mean() + KL_WEIGHT * kl


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, pixels: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of reconstructions from the posterior mean."""
    redrawn = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    return 10 * math.log10(4 / F.mse_loss(redrawn, pixels).item())


@torch.no_grad()
def set_statistics(vae: AutoencoderKLWan, pixels: torch.Tensor) -> None:
    """Note mean and deviation of each latent channel in the configuration, with which the pipeline normalises."""
    mean = vae.encode(pixels).latent_dist.mean
    vae.register_to_config(
        latents_mean=mean.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=mean.std(dim=(0, 2, 3, 4)).tolist()
    )


def train_vae(out: Path, seed: int, minutes: float) -> None:
    """Train encoder and decoder together and save `out/vae`, its latent statistics among its weights."""
    torch.manual_seed(seed)
    vae = build_vae()
    unseen = batch_of_clips(seed + 1, 0, 64)

    def loss_at(step: int, done: float) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return reconstruction_loss(vae, batch_of_clips(seed, step, crowded=done < CROWDED), rng)

    def save(minute: float, step: int, loss: float) -> None:
        set_statistics(vae, batch_of_clips(seed + 2, 0, 128))
        vae.save_pretrained(out / "vae")
        print(f"vae {minute:.1f} min step {step} loss {loss:.5f} psnr {psnr(vae, unseen):.2f}", flush=True)

    schedule = Schedule(minutes, peak_lr=2e-3, constant=0.3, ema_decay=0.995)
    fit(vae, loss_at, schedule, out / "vae.pt", save)
