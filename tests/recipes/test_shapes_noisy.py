"""The noise-aware twin of the video reward: what it learns from, and the head that ships."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignkit.rewards.loading import load_file
from alignkit.rewards.noise_aware import NoiseAwareReward
from alignkit.shipped import path
from alignkit.training.recipe_files import Source
from alignkit.training.recipe_files import load as load_recipe
from alignkit.training.reward_losses import bradley_terry_ties
from tests.recipes.descent import descent

RECIPE = path("recipes", "shapes_noisy.py")
SHAPES = path("assets", "shapes")
NOISY = SHAPES / "noisy"


@cache
def noisy() -> Any:
    return load_file(path("recipes", "shapes", "noisy.py"))


@cache
def held_out_pairs() -> Any:
    return noisy().held_out_pairs_of(48)


def test_variants_differ_in_what_they_are_named_for() -> None:
    plain, clean, control = (load_recipe(Source(RECIPE, name)) for name in ("recipe", "clean", "control"))
    assert dataclasses.replace(clean, model=plain.model, data=plain.data, noise=plain.noise, steps=plain.steps) == plain
    assert clean.noise is None and "noise=None" in clean.model
    assert dataclasses.replace(control, data=plain.data, steps=plain.steps) == plain and "shuffled=True" in control.data


def test_a_head_learns_from_pairs_that_have_the_same_noise_on_both_sides() -> None:
    torch.manual_seed(0)
    model, rng = noisy().scorer(), torch.Generator().manual_seed(0)
    train = noisy().world.split_prompts()[0]
    prompts, first, second, labels = noisy().latent_pairs(noisy().contests.drawn(np.random.default_rng(0), 8, train))
    asked = [noisy().Prompt(prompt, i) for i, prompt in enumerate(prompts)]
    batch = noisy().PairBatch.of_labels(first, second, asked, labels).noised(0.0, 0.5, rng)
    losses = descent(model, bradley_terry_ties, batch, rng)
    assert losses[-1] < 0.8 * losses[0]
    assert all(value.grad is None for value in noisy().generator().pipe.transformer.parameters())


def test_the_shipped_head_tells_held_out_clips_apart_under_noise() -> None:
    found = noisy().accuracies(noisy().trained(NOISY), held_out_pairs(), 0.4)
    assert sum(found[f"{name} without ties"] for name in noisy().DIMENSIONS) / 3 > 0.65, found


def test_the_shipped_head_is_a_reward_of_each_dimension_and_small() -> None:
    prompts, first, *_ = held_out_pairs()
    cond = noisy().conditions(prompts[:2])
    for name in noisy().DIMENSIONS:
        reward = NoiseAwareReward(str(NOISY), name).bind(noisy().generator())
        assert reward.noise_aware and reward(first[:2], torch.full((2,), 0.4), cond).shape == (2,)
    assert sum(file.stat().st_size for file in Path(NOISY).iterdir()) < 4 * 2**20
