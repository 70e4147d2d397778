"""The heads of noised signs that ship: they judge held-out words at every noise level, and only what they are asked."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as load_tensors
from torch.testing import assert_close

from alignkit.rewards.loading import load_file
from alignkit.rewards.noise_aware import NoiseAwareReward
from alignkit.shipped import path
from alignkit.training.recipe_files import Source
from alignkit.training.recipe_files import load as load_recipe
from alignkit.training.reward_losses import bradley_terry_dimensions
from tests.recipes.descent import descent

noisy = load_file(path("recipes", "signs", "noisy.py"))
NOISED, CLEAN = path("assets", "signs", "noisy"), path("assets", "signs", "noisy_clean")
MEGABYTES = 2
WORDS = 40


@cache
def signs() -> Any:
    return noisy.held_out_signs(WORDS)


def recipe(variant: str = "recipe") -> Any:
    return load_recipe(Source(path("recipes", "sign_noisy.py"), variant))


@pytest.mark.parametrize("level", [0.2, 0.6])
def test_the_shipped_head_tells_held_out_words_and_colours_apart_under_noise(level: float) -> None:
    found = noisy.accuracies(noisy.trained(NOISED), signs(), level)
    assert found["spelling"] >= 0.85 and found["sharpness"] >= 0.95 and found["colour"] >= 0.95


def test_words_that_the_measures_ask_are_held_out_from_training() -> None:
    prompts, _ = signs()
    held_out = set(noisy.world.split_words()[1])
    assert len(prompts) == WORDS and all(prompt.split('"')[1] in held_out for prompt in prompts)
    data = noisy.Contests(prompts=20, held_out_words=2)
    assert not {prompt.split('"')[1] for prompt in data.prompts} & held_out


def test_the_shipped_head_is_a_reward_for_each_of_its_dimensions() -> None:
    policy, (prompts, latents) = noisy.generator(), signs()
    cond = noisy.conditions(prompts[:4])
    for name, other in (("legibility", noisy.MISSPELT), ("colour", noisy.COLOURED)):
        reward = NoiseAwareReward(dimension=name).bind(policy)
        assert (reward.name, reward.noise_aware, reward.noise) == (name, True, (0.0, 0.95))
        level = torch.full((4,), 0.2)
        noise = 0.2 * torch.randn(latents[:4, 0].shape, generator=torch.Generator().manual_seed(0))
        right, wrong = (reward(0.8 * latents[:4, side] + noise, level, cond) for side in (noisy.RIGHT, other))
        assert (right > wrong).float().mean() >= 0.75


def test_the_head_that_was_trained_on_clean_latents_is_not_noise_aware() -> None:
    assert not NoiseAwareReward("shipped:assets/signs/noisy_clean", "legibility").noise_aware
    scorer = noisy.NoisyScorer.load(CLEAN, noisy.generator())
    prompts, latents = signs()
    x, cond = latents[:2, 0], noisy.conditions(prompts[:2])
    told = [scorer.scores(noisy.generator(), x, torch.full((2,), level), cond) for level in (0.0, 0.7)]
    assert_close(told[0], told[1])


@pytest.mark.parametrize("folder", [NOISED, CLEAN], ids=["noised", "clean"])
def test_a_shipped_head_is_small(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) < MEGABYTES * 2**20
    assert not any("_mod." in name for name in load_tensors(folder / "model.safetensors"))


def test_pairs_differ_in_what_they_are_judged_by_and_the_control_says_so_at_random() -> None:
    data = noisy.Contests(prompts=30, held_out_words=2)
    batch = data.batch(200, torch.Generator().manual_seed(0))
    assert batch.preferred is not None and set(batch.preferred.unique().tolist()) == {-1, 0, 1}
    assert (batch.preferred != 0).any(dim=1).all()
    assert (batch.winners != batch.losers).flatten(1).any(dim=1).all()
    data.shuffled = True
    shuffled = data.batch(200, torch.Generator().manual_seed(0))
    kept = (shuffled.preferred == batch.preferred).all(dim=1).float().mean()
    assert 0.4 < kept < 0.6
    assert shuffled.preferred is not None
    assert torch.equal(shuffled.preferred.abs(), batch.preferred.abs())


def test_what_is_not_judged_is_the_same_in_both_signs_of_a_pair() -> None:
    """A word for legibility, a colour for colour: (word, colour) of each of the five signs."""
    shows = {noisy.RIGHT: (1, 1), noisy.MISSPELT: (0, 1), noisy.UNCLEAR: (0, 1), noisy.COLOURED: (1, 0)}
    shows[noisy.BOTH] = (0, 0)
    for winner, loser, legible, coloured, _ in noisy.CONTESTS:
        assert (shows[winner][0] - shows[loser][0], shows[winner][1] - shows[loser][1]) == (legible, coloured)


def test_the_variants_differ_in_noise_and_labels_alone() -> None:
    plain, clean, control = (recipe(name) for name in ("recipe", "clean", "control"))
    assert plain.noise == (0.0, 0.95) and clean.noise is None and "noise=None" in clean.model
    assert dataclasses.replace(control, data=plain.data, steps=plain.steps) == plain
    assert "shuffled=True" in control.data
    same = dataclasses.replace(clean, model=plain.model, data=plain.data, noise=plain.noise, steps=plain.steps)
    assert same == plain


def test_a_step_of_training_lowers_the_loss_of_a_batch() -> None:
    torch.manual_seed(0)
    data, model = noisy.Contests(prompts=8, held_out_words=2), noisy.scorer()
    rng = torch.Generator().manual_seed(0)
    batch = data.batch(12, rng).noised(0.0, 0.5, rng)
    trained = [value for value in model.parameters() if value.requires_grad]
    losses = descent(model, bradley_terry_dimensions, batch, rng)
    assert losses[-1] < 0.8 * losses[0]
    assert all(value.grad is None for value in noisy.generator().pipe.transformer.parameters())
    assert all(value.grad is not None for value in trained)
