"""Stage `flow`: teach transformer and text encoder, jointly, to draw signs in the autoencoder's latents."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world
from components import build_pipeline, single_frame_convolutions
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from einops import rearrange
from train_vae import pixels_of

BATCH = 64
PEAK_LR, LAST_LR, WARMUP_STEPS = 1.5e-3, 5e-5, 100
DROPPED_CAPTIONS = (" ", "")  # 5 % each; the negative prompts that guidance is used with
DROPOUT = 0.1
EMA_DECAY = 0.999
SIGMA_LOGIT_MEAN = 0.3
SAVE_SECONDS = 60


@torch.no_grad()
def encode_dataset(
    vae: AutoencoderKLQwenImage, variety: world.Variety, seed: int, size: int
) -> tuple[torch.Tensor, list[str]]:
    """(latents (size, h/2 * w/2, 4 * channels) normalised and packed as the pipeline's, prompts)."""
    mean = torch.tensor(vae.config.latents_mean)[:, None, None, None]
    std = torch.tensor(vae.config.latents_std)[:, None, None, None]
    latents, prompts = [], []
    with single_frame_convolutions(vae):
        for chunk in range(0, size, 64):
            rng = np.random.default_rng([seed, 2, chunk])
            pairs = [world.pretraining_pair(rng, variety) for _ in range(min(64, size - chunk))]
            z = (vae.encode(pixels_of([sign for _, sign in pairs])).latent_dist.mean - mean) / std
            latents.append(rearrange(z, "b c 1 (h p) (w q) -> b (h w) (c p q)", p=2, q=2))
            prompts += [prompt for prompt, _ in pairs]
    return torch.cat(latents), prompts


def tokenise(pipe: QwenImagePipeline, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), (B, L) int64, inside the pipeline's own prompt template, padded on the right."""
    text = [pipe.prompt_template_encode.format(prompt) for prompt in prompts]
    tokens = pipe.tokenizer(text, padding=True, padding_side="right", return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def embed(
    pipe: QwenImagePipeline, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's `encode_prompt`, with gradients: (embeddings (B, L - 34, D), mask (B, L - 34))."""
    hidden = pipe.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[
        -1
    ]
    start = pipe.prompt_template_encode_start_idx
    return hidden[:, start:], mask[:, start:]


def flow_loss(
    pipe: QwenImagePipeline, x0: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, rng: torch.Generator
) -> torch.Tensor:
    """Mean squared error of the velocity eps - x0 at logit-normal sigma. x0: (B, tokens, 32)."""
    sigma = torch.sigmoid(torch.randn(len(x0), generator=rng) + SIGMA_LOGIT_MEAN)
    eps = torch.randn(x0.shape, generator=rng)
    x = torch.lerp(x0, eps, sigma[:, None, None])
    length = int(mask.sum(dim=1).max())
    embeddings, mask = embed(pipe, ids[:, :length], mask[:, :length])
    grid = (1, world.HEIGHT // 8, world.WIDTH // 8)
    velocity = pipe.transformer(
        hidden_states=x,
        timestep=sigma,
        encoder_hidden_states=embeddings,
        encoder_hidden_states_mask=mask,
        img_shapes=[[grid]] * len(x0),
        return_dict=False,
    )[0]
    return F.mse_loss(velocity, eps - x0)


def start_from_identity(pipe: QwenImagePipeline) -> None:
    """Zero the modulations and the output layer (adaLN-zero): each block starts as the identity."""
    for block in pipe.transformer.transformer_blocks:
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            torch.nn.init.zeros_(modulation.weight)
            torch.nn.init.zeros_(modulation.bias)
    torch.nn.init.zeros_(pipe.transformer.proj_out.weight)
    torch.nn.init.zeros_(pipe.transformer.proj_out.bias)


def trained_modules(pipe: QwenImagePipeline) -> torch.nn.ModuleList:
    return torch.nn.ModuleList([pipe.transformer, pipe.text_encoder.model.language_model])


@torch.no_grad()
def set_parameters(parameters: list[torch.nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


@torch.no_grad()
def update_ema(ema: list[torch.Tensor], parameters: list[torch.nn.Parameter], step: int) -> None:
    decay = min(EMA_DECAY, (step + 1) / (step + 10))
    torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - decay)


def ask_for_float32(config: Path) -> None:
    """transformers loads in the dtype that the config names, diffusers in float32: without this a plain
    `from_pretrained` mixes the two and the first matrix product fails."""
    config.write_text(config.read_text("utf-8").replace('"float16"', '"float32"'), "utf-8")


@torch.no_grad()
def save_pipeline(pipe: QwenImagePipeline, ema: list[torch.Tensor], path: Path) -> None:
    """Save the EMA weights as a float16 pipeline; `pipe` keeps its own weights."""
    parameters = list(trained_modules(pipe).parameters())
    live = [p.detach().clone() for p in parameters]
    set_parameters(parameters, ema)
    for name in ("transformer", "text_encoder", "vae"):
        component = pipe.components[name]
        original = {key: value.clone() for key, value in component.state_dict().items()}
        component.half().save_pretrained(path / name)
        component.float().load_state_dict(original)
    ask_for_float32(path / "text_encoder" / "config.json")
    pipe.tokenizer.save_pretrained(path / "tokenizer")
    pipe.scheduler.save_pretrained(path / "scheduler")
    pipe.save_config(path)
    set_parameters(parameters, live)


def learning_rate(step: int, done: float) -> float:
    """Warm-up, then constant, then a cosine over the last half of the time budget."""
    decay = 0.5 * (1 + math.cos(math.pi * max(0.0, 2 * done - 1)))
    return min(1.0, (step + 1) / WARMUP_STEPS) * (LAST_LR + (PEAK_LR - LAST_LR) * decay)


def train_flow(
    out: Path, variety: world.Variety, phase: str, start: str | None, seed: int, minutes: float, size: int
) -> None:
    """One phase of training: `minutes` of wall time on `size` pairs of `variety`; saves `out/generator`.

    Goes on from `out/{phase}.pt`, else begins from the averaged weights of `out/{start}.pt`, else from nothing.
    """
    vae = AutoencoderKLQwenImage.from_pretrained(out / "vae").eval().requires_grad_(False)
    torch.manual_seed(seed)
    pipe = build_pipeline(vae)
    start_from_identity(pipe)
    latents, prompts = encode_dataset(vae, variety, seed, size)
    ids, mask = tokenise(pipe, [*prompts, *DROPPED_CAPTIONS])
    print(f"{phase}: {size} pairs, latent std {latents.std():.3f}, text length {ids.shape[1]}", flush=True)
    parameters = list(trained_modules(pipe).parameters())
    if start is not None:
        set_parameters(parameters, torch.load(out / f"{start}.pt", weights_only=True)["ema"])
    ema = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint, step, spent, running = out / f"{phase}.pt", 0, 0.0, 1.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        set_parameters(parameters, state["parameters"])
        ema = state["ema"]
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    began = saved = time.monotonic()

    def save() -> None:
        minute = (spent + time.monotonic() - began) / 60
        state = {"parameters": parameters, "ema": ema, "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state | {"spent": 60 * minute}, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)
        save_pipeline(pipe, ema, out / "generator")
        print(f"{phase} {minute:.1f} min step {step} loss {running:.4f}", flush=True)

    while (done := (spent + time.monotonic() - began) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, done)
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(size, (BATCH,), generator=rng)
        dropped = torch.rand(BATCH, generator=rng) < DROPOUT
        captions = torch.where(
            dropped, size + torch.randint(len(DROPPED_CAPTIONS), (BATCH,), generator=rng), rows
        )
        loss = flow_loss(pipe, latents[rows], ids[captions], mask[captions], rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        update_ema(ema, parameters, step)
        step += 1
        running += 0.02 * (loss.item() - running)
        if time.monotonic() - saved > SAVE_SECONDS:
            saved = time.monotonic()
            save()
    save()
