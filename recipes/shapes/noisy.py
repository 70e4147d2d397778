"""The video reward's noise-aware twin: it judges noised latents of clips in look, motion and what was asked.

What `recipes/shapes_noisy.py` trains on the generator's own first blocks: the scorer, its examples, and how well it
tells clips apart at each noise level.

    python recipes/shapes/noisy.py noised=runs/shapes_noisy/model clean=... --keep found.json --out accuracy.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alignkit import Policy, Prompt
from alignkit.objectives.preference import accuracy_with_ties, accuracy_without_ties, tie_threshold
from alignkit.rewards.loading import load_file
from alignkit.rewards.noisy_head import HeadConfig, NoisyScorer
from alignkit.shipped import path
from alignkit.training.examples import PairBatch

contests = load_file(path("recipes", "shapes", "contests.py"))
world = contests.world
heads = load_file(path("recipes", "worlds", "heads.py"))

DIMENSIONS = contests.DIMENSIONS
task = load_file(path("recipes", "shapes", "task.py"))
CALL = {**task.CALL, "guidance_scale": 1.0}
LEVELS = heads.LEVELS


@cache
def generator() -> Policy:
    """The generator of moving shapes."""
    return heads.frozen(task.GENERATOR)


@cache
def encoded() -> tuple[dict[str, int], Any]:
    """The place of every prompt of the world, and their conditioning, encoded once for all."""
    train, held_out = world.split_prompts()
    every = [*train, *held_out]
    cond = generator().condition([Prompt(text, i) for i, text in enumerate(every)], num_steps=2, **CALL)
    return {text: i for i, text in enumerate(every)}, cond


def conditions(prompts: Sequence[str]) -> Any:
    places, cond = encoded()
    return cond[[places[str(prompt)] for prompt in prompts]]


class Clips(nn.Module):
    """The head in training."""

    def __init__(self, noise: tuple[float, float] | None, depth: int) -> None:
        super().__init__()
        width = generator().pipe.transformer.config.num_attention_heads
        width *= generator().pipe.transformer.config.attention_head_dim
        pipeline = type(generator().pipe).__name__
        config = HeadConfig(pipeline, DIMENSIONS, width, depth, "own", noise=noise, hidden=128)
        self.scorer = NoisyScorer.of(config, generator())

    def forward(self, media: Tensor, prompts: Sequence[Prompt], sigma: Tensor | None = None) -> Tensor:
        """(B, 3) of latents at noise levels; None: clean."""
        level = torch.zeros(len(media)) if sigma is None else sigma
        return self.scorer.scores(generator(), media, level, conditions(prompts))

    def save(self, folder: Path) -> None:
        self.scorer.save(folder)


def scorer(noise: tuple[float, float] | None = (0.0, 0.95), depth: int = 2) -> Clips:
    return Clips(noise, depth)


Pairs = tuple[list[str], Tensor, Tensor, Tensor]
"""Prompts, clean latents of the first and the second clips, (N, 3) labels."""


def latent_pairs(pairs: Any) -> Pairs:
    """Pairs of clips as the generator's encoder has them."""
    prompts, first, second, labels = pairs
    return prompts, latents_of(first, prompts), latents_of(second, prompts), torch.from_numpy(labels)


@torch.no_grad()
def latents_of(clips: np.ndarray, prompts: Sequence[str], batch: int = 64) -> Tensor:
    """(N, ...) clean latents of (N, T, H, W, 3) uint8."""
    parts = [slice(start, start + batch) for start in range(0, len(clips), batch)]
    return torch.cat([generator().encode(contests.as_media(clips[rows]), conditions(prompts[rows])) for rows in parts])


class Contests:
    """Pairs of clean latents of one prompt with labels as people give them, drawn and encoded once.

    Args:
        pairs: how many.
        mistaken, unanswered: shares of labels that are noise and that are missing.
        shuffled: the control: pairs get the labels of other pairs.
        held_out_pairs: how many the measures use, with clean labels and of held-out prompts.
        noised: whether the measures on the way are of noised latents.
    """

    def __init__(
        self,
        pairs: int = 4000,
        mistaken: float = 0.05,
        unanswered: float = 0.03,
        shuffled: bool = False,
        held_out_pairs: int = 128,
        noised: bool = True,
    ) -> None:
        self.levels = LEVELS if noised else (0.0,)
        rng, train = np.random.default_rng([7, 0]), world.split_prompts()[0]
        prompts, first, second, labels = contests.drawn(rng, pairs, train, mistaken, unanswered)
        self.pairs = latent_pairs((prompts, first, second, rng.permutation(labels) if shuffled else labels))
        self.held_out = held_out_pairs_of(held_out_pairs)

    def batch(self, size: int, rng: torch.Generator) -> PairBatch:
        prompts, first, second, labels = self.pairs
        rows = torch.randint(len(prompts), (size,), generator=rng)
        asked = [Prompt(prompts[i], i) for i in rows.tolist()]
        return PairBatch.of_labels(first[rows], second[rows], asked, labels[rows])

    def measure(self, model: Any) -> dict[str, float]:
        """Accuracy without ties by dimension and noise level."""
        found = {level: accuracies(model, self.held_out, level) for level in self.levels}
        return {f"{name} at {level:g}": found[level][f"{name} without ties"] for level in found for name in DIMENSIONS}


def held_out_pairs_of(count: int) -> Pairs:
    return latent_pairs(contests.drawn(np.random.default_rng([7, 1]), count, world.split_prompts()[1]))


@torch.no_grad()
def accuracies(model: Any, pairs: Pairs, level: float) -> dict[str, float]:
    """With and without ties, by dimension, of held-out pairs that have the same noise on both sides."""
    prompts, first, second, labels = pairs
    eps = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
    sigma, asked = torch.full((len(prompts),), level), [Prompt(prompt) for prompt in prompts]
    sides = [model((1 - level) * x0 + level * eps, asked, sigma) for x0 in (first, second)]
    found = {}
    for i, name in enumerate(DIMENSIONS):
        lead, label = (sides[0] - sides[1])[:, i], labels[:, i]
        found[f"{name} with ties"] = accuracy_with_ties(lead, label, tie_threshold(lead, label))
        found[f"{name} without ties"] = accuracy_without_ties(lead, label)
    return found


# the command


def trained(folder: Path) -> Any:
    """A saved head, as the measures call it."""
    held = NoisyScorer.load(folder, generator())
    return lambda latents, prompts, sigma: held.scores(generator(), latents, sigma, conditions(prompts))


def curves(model: Any, pairs: Pairs) -> Any:
    """Each measure at every level of LEVELS."""
    return heads.by_measure([accuracies(model, pairs, level) for level in LEVELS])


def measured(folders: Mapping[str, Path]) -> dict[str, Any]:
    """The curves of trained heads, by name."""
    pairs = held_out_pairs_of(256)
    return {name: curves(trained(folder), pairs) for name, folder in folders.items()}


PANELS = {"VQ": "VQ: look", "MQ": "MQ: motion", "TA": "TA: what was asked"}

if __name__ == "__main__":
    heads.command(__doc__, measured, {f"{name} without ties": title for name, title in PANELS.items()}, lowest=0.3)
