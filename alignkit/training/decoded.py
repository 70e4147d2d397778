"""What of its videos a round decodes, said before anything runs: seen on a small random twin of the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from alignkit.data.prompts import load_prompts
from alignkit.errors import RewardError
from alignkit.policy.frames import Call, Watched
from alignkit.rewards import Weighted, load
from alignkit.rewards.base import OfFrames
from alignkit.shipped import resolved
from alignkit.training import shrink
from alignkit.training.blueprint import Blueprint, build, compression, count
from alignkit.training.recipe import Recipe
from alignkit.training.shaped import Shaped
from alignkit.types import Prompt

PROMPTS = 256  # of the recipe's, over which is averaged
SMALL_ENOUGH = 2_000_000  # parameters of a decoder that is watched as it is


def decoded(recipe: Recipe, found: Blueprint, call: Mapping[str, Any]) -> dict[str, Any] | None:
    """How many frames and latent frames of each sampled video are decoded, on average over the recipe's prompts; None
    for pictures, for recipes that sample nothing, and where the decoder cannot be watched."""
    vae, frames = found.components.get("vae"), call.get("num_frames")
    if recipe.data is not None or vae is None or not isinstance(frames, int):
        return None
    shape = compression(vae)
    if shape is None:
        return None
    channels, _, time = shape
    latents = (frames - 1) // time + 1
    record = {"frames": frames, "latent_frames": latents, "whole_for": whole_for(recipe)}
    if record["whole_for"] is not None:
        return record | {"mean_frames": frames, "mean_latent_frames": latents, "rewards": []}
    twin, watched = twin_of(vae), Watched()
    one = Call("vae", torch.zeros(1, channels, latents, 2, 2), (), {})
    if count(twin) == 0 or vae.config.get("timestep_conditioning"):  # type: ignore[union-attr]
        return None
    total = watched.frames(twin, one)
    weighted = Weighted(recipe.rewards)
    needed = [weighted.frames_needed(total, batch) or total for batch in batches(recipe)]
    return record | {
        "frames": total,
        "mean_frames": mean(needed),
        "mean_latent_frames": mean(watched.needed(twin, one, frames) for frames in needed),
        "rewards": list(weighted.rewards),
    }


def whole_for(recipe: Recipe) -> str | None:
    """What makes the recipe decode whole videos; None: nothing."""
    if recipe.keeps_media:
        return "the method, which keeps them"
    if isinstance(recipe, Shaped) and recipe.diversity_shaping:
        return "features of diversity_shaping"
    for spec in recipe.rewards:
        try:
            reward = load(spec)
        except RewardError:  # a program that is not installed; the plan says so beside the reward
            return str(spec)
        if reward.kind != "latent" and not isinstance(reward, OfFrames):
            return reward.name
    return None


def batches(recipe: Recipe) -> Iterator[Sequence[Prompt]]:
    """The prompts of each rollout batch of a pass over the recipe's prompts; without the file, prompts by id."""
    file = None if recipe.prompts is None else Path(resolved(recipe.prompts))
    here = file is not None and file.exists()
    prompts = load_prompts(file)[:PROMPTS] if here and file else [Prompt("", id=i) for i in range(PROMPTS)]
    samples = min(recipe.rollout_batch or recipe.prompts_per_step * recipe.group_size, len(prompts) * recipe.group_size)
    size = -(-samples // recipe.group_size)
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def twin_of(vae: nn.Module) -> nn.Module:
    """A decoder of the same class with random weights, narrow where the original (on the meta device) is large."""
    config: Mapping[str, Any] = vae.config  # type: ignore[assignment]
    small = config if count(vae) <= SMALL_ENOUGH else shrink.autoencoder(config)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build(type(vae), small).eval()


def lines(found: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """(what, how much) for people."""
    if found is None:
        return
    frames, latents = found["frames"], found["latent_frames"]
    if found["whole_for"] is not None:
        yield "decoding", f"all {latents} latent frames, {frames} frames: whole videos for {found['whole_for']}"
        return
    looks = f"{', '.join(found['rewards'])}: the first {found['mean_frames']:.1f} of {frames} frames on average"
    if found["mean_latent_frames"] < latents:
        yield "decoding", f"{found['mean_latent_frames']:.1f} of {latents} latent frames on average; {looks}"
    elif found["mean_frames"] < frames:  # it looks ahead, or works in chunks
        yield "decoding", f"all {latents} latent frames, as the decoder needs them for what is looked at; {looks}"
    else:
        yield "decoding", f"all {latents} latent frames; {looks}"
