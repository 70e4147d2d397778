"""Stage `flow`: teach transformer and text encoder, jointly, to draw clips in the autoencoder's latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world
from components import build_pipeline
from diffusers import AutoencoderKLWan, WanPipeline
from fitting import Schedule, fit, set_parameters
from train_vae import pixels_of

BATCH = 32
DROPOUT = 0.1  # share of captions that are empty, the negative prompt of guidance
SIGMA_LOGIT_MEAN = 0.3
# The pipeline pads embeddings with zeros that the transformer attends to, so the length changes the clip: both its
# default and a short length are learnt, the short one mostly because it is much faster.
TEXT_LENGTHS, LONG_SHARE = (8, 512), 0.03


def normalised(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """(B, C, f, h, w) latents of the autoencoder as the pipeline's: mean 0 and deviation 1 in every channel."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std


@torch.no_grad()
def encode_dataset(vae: AutoencoderKLWan, faults: world.Faults, seed: int, size: int) -> tuple[torch.Tensor, list[str]]:
    """((size, C, f, h, w) normalised latents, prompts)."""
    latents, prompts = [], []
    for chunk in range(0, size, 64):
        rng = np.random.default_rng([seed, 2, chunk])
        pairs = [world.pretraining_pair(rng, faults) for _ in range(min(64, size - chunk))]
        latents.append(normalised(vae, vae.encode(pixels_of([clip for _, clip in pairs])).latent_dist.mean))
        prompts += [prompt for prompt, _ in pairs]
    return torch.cat(latents), prompts


def tokenise(pipe: WanPipeline, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), (B, 8) int64, padded on the right as the pipeline does."""
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=min(TEXT_LENGTHS), return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def embedded(pipe: WanPipeline, ids: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
    """(B, length, d) embeddings, zero behind the prompt, as the pipeline has them."""
    hidden = pipe.text_encoder(ids, mask)[0] * mask[..., None]
    return F.pad(hidden, (0, 0, 0, length - ids.shape[1]))


def flow_loss(pipe: WanPipeline, x0: torch.Tensor, embeds: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Mean squared error of the velocity eps - x0 at logit-normal sigma. x0: (B, C, f, h, w); embeds: (B, L, d)."""
    sigma = torch.sigmoid(torch.randn(len(x0), generator=rng) + SIGMA_LOGIT_MEAN)
    eps = torch.randn(x0.shape, generator=rng)
    noised = torch.lerp(x0, eps, sigma.view(-1, 1, 1, 1, 1))
    velocity = pipe.transformer(noised, 1000 * sigma, embeds, return_dict=False)[0]
    return F.mse_loss(velocity, eps - x0)


def save_pipeline(pipe: WanPipeline, path: Path) -> None:
    """Save as a float16 pipeline; `pipe` keeps its own weights."""
    for name in ("transformer", "text_encoder", "vae"):
        component = pipe.components[name]
        original = {key: value.clone() for key, value in component.state_dict().items()}
        component.half().save_pretrained(path / name)
        component.float().load_state_dict(original)
    # transformers loads in the dtype that the config names, diffusers in float32: without this a plain
    # `from_pretrained` mixes the two and the first matrix product fails
    config = path / "text_encoder" / "config.json"
    config.write_text(config.read_text("utf-8").replace('"float16"', '"float32"'), "utf-8")
    pipe.tokenizer.save_pretrained(path / "tokenizer")
    pipe.scheduler.save_pretrained(path / "scheduler")
    pipe.save_config(path)


def train_flow(
    out: Path, faults: world.Faults, phase: str, start: str | None, seed: int, minutes: float, size: int
) -> None:
    """One phase of training: `minutes` of wall time on `size` pairs; saves `out/generator`.

    Goes on from `out/{phase}.pt`, else begins from the averaged weights of `out/{start}.pt`, else from nothing.
    """
    vae = AutoencoderKLWan.from_pretrained(out / "vae").eval().requires_grad_(False)
    vae.register_to_config(_name_or_path="")  # else the folder of this run is shipped with it
    torch.manual_seed(seed)
    pipe = build_pipeline(vae)
    trained = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder])
    if start is not None:
        set_parameters(list(trained.parameters()), torch.load(out / f"{start}.pt", weights_only=True)["ema"])
    latents, prompts = encode_dataset(vae, faults, seed, size)
    ids, mask = tokenise(pipe, [*prompts, ""])
    print(f"{phase}: {size} pairs, latent std {latents.std():.3f}", flush=True)

    def loss_at(step: int, done: float) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(size, (BATCH,), generator=rng)
        captions = torch.where(torch.rand(BATCH, generator=rng) < DROPOUT, size, rows)
        length = TEXT_LENGTHS[int(torch.rand((), generator=rng) < LONG_SHARE)]
        return flow_loss(pipe, latents[rows], embedded(pipe, ids[captions], mask[captions], length), rng)

    def save(minute: float, step: int, loss: float) -> None:
        save_pipeline(pipe, out / "generator")
        print(f"{phase} {minute:.1f} min step {step} loss {loss:.4f}", flush=True)

    schedule = Schedule(minutes, peak_lr=1e-3, last_lr=5e-5, warmup_steps=100, weight_decay=0.01)
    fit(trained, loss_at, schedule, out / f"{phase}.pt", save)
