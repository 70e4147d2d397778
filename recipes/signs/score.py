"""Stage `score`: what the generator reads like, through the plain pipeline, with alignkit's own readers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import world
from diffusers import AutoencoderKLQwenImage, DiffusionPipeline, QwenImagePipeline
from train_vae import pixels_of, psnr

from alignkit.rewards.color import SignColor
from alignkit.rewards.ocr import OCR
from alignkit.rewards.text import exact, similarity

SETTINGS = (  # (steps, true_cfg_scale, words)
    (8, 1.0, "held_out_words"),
    (10, 1.0, "held_out_words"),
    (10, 2.0, "held_out_words"),
    (10, 4.0, "held_out_words"),
    (50, 1.0, "held_out_words"),
    (10, 1.0, "train_words"),
)
FIRST_SEED = 1234


@torch.no_grad()
def sample(
    pipe: QwenImagePipeline,
    prompts: list[str],
    seeds: list[int],
    steps: int,
    guidance: float = 1.0,
    batch: int = 60,
) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1], one generator per image. guidance above 1 uses the negative prompt " "."""
    images = []
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        guided = {"negative_prompt": [" "] * len(chunk)} if guidance > 1 else {}
        images.append(
            pipe(
                prompt=chunk,
                height=world.HEIGHT,
                width=world.WIDTH,
                num_inference_steps=steps,
                true_cfg_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]],
                output_type="pt",
                **guided,
            ).images
        )
    return torch.cat(images).float()


class Judge:
    """OCR and colour readers of the sign world."""

    def __init__(self, world_file: Path) -> None:
        self.ocr = OCR()
        self.colour = SignColor(world_file)

    def __call__(self, media: torch.Tensor, words: list[str], colours: list[str]) -> dict[str, torch.Tensor]:
        """{"ocr", "exact", "colour"}: (B,) each, of (B, 3, H, W) in [0, 1]."""
        read = self.ocr.read(media)
        seen = self.colour.read(media)
        right = torch.tensor([float(a == b) for a, b in zip(seen, colours, strict=True)])
        return {"ocr": similarity(read, words), "exact": exact(read, words), "colour": right}


def colours_for(words: list[str]) -> list[str]:
    """The world's colours in turn."""
    names = list(world.COLOURS)
    return [names[i % len(names)] for i in range(len(words))]


def score_vae(vae: AutoencoderKLQwenImage, judge: Judge, words: list[str]) -> dict[str, float]:
    """PSNR in dB, and how clean signs read before and after the autoencoder."""
    rng = np.random.default_rng(0)
    colours = colours_for(words)
    pixels = pixels_of([world.random_sign(rng, word, colour) for word, colour in zip(words, colours)])
    with torch.no_grad():
        redrawn = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    original, copy = (judge(p[:, :, 0] / 2 + 0.5, words, colours) for p in (pixels, redrawn))
    return {
        "psnr": psnr(vae, pixels),
        "original_exact": original["exact"].mean().item(),
        "reconstruction_ocr": copy["ocr"].mean().item(),
        "reconstruction_exact": copy["exact"].mean().item(),
    }


def mixed_groups(
    pipe: QwenImagePipeline, judge: Judge, words: list[str], steps: int = 8, seeds: int = 16
) -> float:
    """Share of prompts whose `seeds` pictures are neither all read right nor all wrong: groups with a signal."""
    repeated = [word for word in words for _ in range(seeds)]
    colours = [colour for colour in colours_for(words) for _ in range(seeds)]
    prompts = [world.prompt_for(word, colour) for word, colour in zip(repeated, colours)]
    media = sample(pipe, prompts, [FIRST_SEED + i for i in range(len(prompts))], steps)
    right = judge(media, repeated, colours)["exact"].view(len(words), seeds).mean(dim=1)
    return ((right > 0) & (right < 1)).float().mean().item()


def score(generator: Path, world_file: Path, settings: tuple = SETTINGS, limit: int = 120) -> dict:
    """Scores of a saved generator, printed as they come and returned; fixed seeds."""
    pipe = DiffusionPipeline.from_pretrained(generator)
    pipe.set_progress_bar_config(disable=True)
    judge, record = Judge(world_file), json.loads(world_file.read_text("utf-8"))
    results: dict = {"vae": score_vae(pipe.vae, judge, record["held_out_words"])}
    print(f"score vae {results['vae']}", flush=True)
    for steps, guidance, which in settings:
        words = record[which][:: max(1, len(record[which]) // limit)][:limit]
        colours = colours_for(words)
        prompts = [world.prompt_for(word, colour) for word, colour in zip(words, colours)]
        media = sample(pipe, prompts, [FIRST_SEED + i for i in range(len(words))], steps, guidance)
        scores = {name: value.mean().item() for name, value in judge(media, words, colours).items()}
        results[f"{which}, {steps} steps, guidance {guidance:g}"] = scores
        print(f"score {which} steps {steps} guidance {guidance:g} {scores}", flush=True)
    return results
