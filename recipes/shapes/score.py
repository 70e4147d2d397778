"""What a saved generator draws, through the plain pipeline, as the tracker sees it.

    python recipes/shapes/score.py assets/shapes/generator [--out score.json] [--sheet samples.png] [--seeds 4]
    python recipes/shapes/score.py assets/shapes/generator --lora runs/video_quickstart/lora

Fixed seeds. A clip counts as `still` where it hardly moves, as `wrong_direction` where it moves another way than the
prompt says, as `jerky`, `flickering` and `mistaken` where smoothness, steadiness and identity are below GOOD; it may
have several of these faults. `good` is the share of clips without any.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import tracker
import world
from diffusers import AutoencoderKLWan, WanPipeline
from einops import rearrange
from train_vae import pixels_of, psnr

from alignkit.data.video import contact_sheet

# (steps, guidance, prompts, text length); the first is how recipes sample
SETTINGS = (
    (8, 1.0, "held_out", 8),
    (8, 1.0, "train", 8),
    (8, 3.0, "held_out", 8),
    (20, 1.0, "held_out", 8),
    (50, 1.0, "held_out", 8),
    (50, 5.0, "held_out", 512),  # the pipeline's own defaults
)
GOOD = {"smoothness": 0.7, "steadiness": 0.7, "identity": 0.9}
SLOWEST = 0.5  # pixels per frame; slower clips stand still
FIRST_SEED = 1234


@torch.no_grad()
def sample(
    pipe: WanPipeline,
    prompts: Sequence[str],
    steps: int,
    guidance: float = 1.0,
    text_length: int = 8,
    batch: int = 64,
) -> torch.Tensor:
    """(B, T, 3, H, W) in [0, 1], one generator per clip with seeds from FIRST_SEED on."""
    clips = []
    for start in range(0, len(prompts), batch):
        chunk = list(prompts[start : start + batch])
        made = pipe(
            prompt=chunk,
            height=world.SIZE,
            width=world.SIZE,
            num_frames=world.FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=text_length,
            generator=[torch.Generator().manual_seed(FIRST_SEED + start + i) for i in range(len(chunk))],
            output_type="pt",
        )
        clips.append(torch.as_tensor(made.frames).float())  # pyright: ignore[reportAttributeAccessIssue]
    return torch.cat(clips).clamp(0, 1)


def faults(parts: dict[str, float]) -> dict[str, bool]:
    """Which faults a clip has, from its `tracker.judge`."""
    still = parts["direction"] == 0 and parts["speed"] < SLOWEST
    found = {
        "still": still,
        "wrong_direction": parts["direction"] == 0 and not still,
        "jerky": parts["smoothness"] < GOOD["smoothness"],
        "flickering": parts["steadiness"] < GOOD["steadiness"],
        "mistaken": parts["identity"] < GOOD["identity"],
    }
    return {**found, "good": not any(found.values())}


def summary(media: torch.Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Means of the tracker and its parts, and shares of clips with each fault."""
    found = tracker.judgements(media, prompts)
    rows = [{"tracker": parts["all"], **parts, **faults(parts)} for parts in found]
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0] if name != "all"}


@torch.no_grad()
def score_vae(vae: AutoencoderKLWan, count: int = 96) -> dict[str, float]:
    """PSNR in dB of clips without faults, and the tracker's parts before and after the autoencoder."""
    rng = np.random.default_rng(0)
    train, _ = world.split_prompts()
    prompts = [train[i % len(train)] for i in range(count)]
    pixels = pixels_of([world.random_clip(rng, *world.parse(prompt)) for prompt in prompts])
    redrawn = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in pixels.split(32)])
    media = [rearrange(clips / 2 + 0.5, "b c t h w -> b t c h w").clamp(0, 1) for clips in (pixels, redrawn)]
    before, after = (summary(one, prompts) for one in media)
    return {
        "psnr": round(psnr(vae, pixels), 2),
        **{f"{name}_drawn": before[name] for name in ("tracker", *tracker.PARTS)},
        **{f"{name}_redrawn": after[name] for name in ("tracker", *tracker.PARTS)},
    }


def mixed_groups(media: torch.Tensor, prompts: Sequence[str], seeds: int) -> float:
    """Share of prompts of which some clips are good and some are not: groups with a signal. Clips of a prompt are
    `len(prompts) / seeds` apart."""
    good = [faults(parts)["good"] for parts in tracker.judgements(media, prompts)]
    share = np.array(good, float).reshape(seeds, -1).mean(axis=0)
    return round(float(((share > 0) & (share < 1)).mean()), 4)


def loaded(generator: Path, lora: Path | None = None) -> WanPipeline:
    """The plain pipeline, with adapters or without."""
    pipe = WanPipeline.from_pretrained(generator)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora)
    return pipe


def score(generator: Path, settings: Sequence[tuple] = SETTINGS, seeds: int = 4, lora: Path | None = None) -> dict:
    """Scores of a saved generator, printed as they come and returned.

    Args:
        seeds: clips per held-out prompt; training prompts get one.
    """
    pipe = loaded(generator, lora)
    prompts = dict(zip(("train", "held_out"), world.split_prompts()))
    results: dict = {}
    if lora is None:  # adapters leave the autoencoder as it is
        results["vae"] = score_vae(pipe.vae)
        print(f"score vae {results['vae']}", flush=True)
    for number, (steps, guidance, which, text_length) in enumerate(settings):
        repeated = prompts[which] * (seeds if which == "held_out" else 1)
        media = sample(pipe, repeated, steps, guidance, text_length)
        found = summary(media, repeated)
        if number == 0:
            found["mixed_groups"] = mixed_groups(media, repeated, seeds)
        name = f"{which}, {steps} steps, guidance {guidance:g}, text {text_length}"
        results[name] = found
        print(f"score {name} {found}", flush=True)
    return results


def sheet(generator: Path, path: Path, rows: int = 12, steps: int = 8, lora: Path | None = None) -> None:
    """A picture of samples: held-out prompts below each other, frames from left to right."""
    pipe = loaded(generator, lora)
    _, held_out = world.split_prompts()
    prompts = held_out[:: len(held_out) // rows][:rows]
    media = sample(pipe, prompts, steps)
    contact_sheet(media, scale=3).save(path)
    for prompt, parts in zip(prompts, tracker.judgements(media, prompts)):
        print(prompt, {name: round(value, 2) for name, value in parts.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generator", type=Path, help="folder of the saved pipeline")
    parser.add_argument("--out", type=Path, help="where the scores are written, a JSON file")
    parser.add_argument("--sheet", type=Path, help="draw samples into this PNG instead of scoring")
    parser.add_argument("--seeds", type=int, default=4, help="clips per held-out prompt")
    parser.add_argument("--lora", type=Path, help="adapters to load; only sampling as in recipes is scored")
    args = parser.parse_args()
    if args.sheet:
        sheet(args.generator, args.sheet, lora=args.lora)
        return
    results = score(args.generator, SETTINGS[:1] if args.lora else SETTINGS, args.seeds, args.lora)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
