"""Pictures of signs that a judge is taught with: legible ones and spoilt ones, and strings that they do not show."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from einops import rearrange
from torch import Tensor

from alignkit.shipped import path


def neighbour(name: str) -> ModuleType:
    """A module of this folder, whose files import each other as a script's neighbours."""
    folder = str(path("recipes", "signs"))
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


world, components = neighbour("world"), neighbour("components")

SLOTS = 5  # letters of the longest word

# Shares of pictures whose word nobody should confirm; the rest are legible.
FLAWS = {"defocused": 0.10, "blended": 0.10, "erased": 0.05, "empty": 0.03, "shuffled": 0.02}
BLEND = (0.35, 0.65)  # of the letters of another word in a blended sign
SOFTNESS = (0.0, 0.8)  # pixels of blur on legible signs
DECODED = 0.5  # share of pictures that went through the generator's autoencoder
LATENT_JITTER = 0.35  # largest noise on their latents, in their standard deviations


@dataclass(frozen=True)
class Shown:
    """What a picture shows.

    Attributes:
        legible: whether its word is there to be read.
        coloured: whether its colour is.
    """

    sign: Any
    legible: bool = True
    coloured: bool = True


def one_letter(word: str, rng: np.random.Generator) -> str:
    """One letter exchanged for another."""
    at = int(rng.integers(len(word)))
    others = [letter for letter in world.LETTERS if letter != word[at]]
    return word[:at] + others[rng.integers(len(others))] + word[at + 1 :]


def swapped(word: str, rng: np.random.Generator) -> str:
    """The last two letters exchanged, or one time in three two other neighbours."""
    at = len(word) - 2 if rng.random() < 2 / 3 else int(rng.integers(len(word) - 1))
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def length(word: str, rng: np.random.Generator) -> str:
    """One letter more or fewer at the end."""
    if len(word) > 3 and (len(word) == SLOTS or rng.random() < 0.5):
        return word[:-1]
    return word + world.LETTERS[rng.integers(26)]


def other_word(word: str, rng: np.random.Generator) -> str:
    return world.pretraining_word(rng)


MISTAKES = {"one_letter": one_letter, "swapped": swapped, "other_word": other_word, "length": length}
SHARES = (0.45, 0.3, 0.15, 0.1)


def mistaken(word: str, kind: str, rng: np.random.Generator) -> str:
    """A string that is neither `word` nor a held-out word; where there is none of this kind ("EEE"), of another."""
    held_out = set(world.split_words()[1])
    for _ in range(8):
        wrong = MISTAKES[kind](word, rng)
        if wrong != word and wrong not in held_out:
            return wrong
    return mistaken(word, "one_letter", rng)


def spoilt(pixels: np.ndarray, sign: Any, flaw: str, rng: np.random.Generator) -> np.ndarray:
    """A legible sign's pixels (H, W, 3) uint8 with one of `FLAWS`."""
    if flaw == "defocused":
        return world.draw(dataclasses.replace(sign, defocus=float(rng.uniform(*world.DEFOCUS_PIXELS))))
    if flaw == "blended":
        ghost = world.draw(dataclasses.replace(sign, word=mistaken(sign.word, "one_letter", rng)))
        share = rng.uniform(*BLEND)
        return (share * pixels + (1 - share) * ghost).round().astype(np.uint8)
    ground = world.draw(dataclasses.replace(sign, word=""))
    if flaw == "empty":
        return ground
    if flaw == "shuffled":
        return rng.permutation(pixels.reshape(-1, 3)).reshape(pixels.shape)
    start = (world.WIDTH - world.CELL * len(sign.word)) // 2 + sign.offset[0]
    slot = int(rng.integers(len(sign.word)))
    columns = slice(max(0, start + world.CELL * slot), max(0, start + world.CELL * (slot + 1)))
    erased = pixels.copy()
    erased[:, columns] = ground[:, columns]
    return erased


def draw(word: str, rng: np.random.Generator, flaw: str | None = None) -> tuple[np.ndarray, Shown]:
    """(pixels (H, W, 3) uint8, what they show) of a sign in a random colour."""
    colour = list(world.COLOURS)[rng.integers(len(world.COLOURS))]
    sign = world.random_sign(rng, word, colour, defocus=float(rng.uniform(*SOFTNESS)))
    pixels = world.draw(sign)
    if flaw is None:
        return pixels, Shown(sign)
    return spoilt(pixels, sign, flaw, rng), Shown(sign, legible=False, coloured=flaw != "shuffled")


def draw_training(rng: np.random.Generator) -> tuple[np.ndarray, Shown, str]:
    """(pixels, what they show, a string that they do not show)."""
    right = world.pretraining_word(rng)
    wrong = mistaken(right, str(rng.choice(list(MISTAKES), p=SHARES)), rng)
    if rng.random() < 0.5:  # neither the shown nor the other string is more often a word
        right, wrong = wrong, right
    flaw = str(rng.choice(["", *FLAWS], p=[1 - sum(FLAWS.values()), *FLAWS.values()]))
    return *draw(right, rng, flaw or None), wrong


def as_media(pixels: list[np.ndarray]) -> Tensor:
    """(B, 3, H, W) in [0, 1]."""
    return rearrange(torch.from_numpy(np.stack(pixels)), "b h w c -> b c h w").float() / 255


@torch.no_grad()
def redrawn(vae: AutoencoderKLQwenImage, media: Tensor, jitter: Tensor, rng: torch.Generator) -> Tensor:
    """(B, 3, H, W) decoded from noisy latents: soft edges and flaws as in generated signs. jitter: (B,)."""
    if not len(media):
        return media
    std = torch.tensor(vae.config.latents_std)[:, None, None, None]
    with components.single_frame_convolutions(vae):
        z = vae.encode(media[:, :, None] * 2 - 1).latent_dist.mean
        z = z + torch.randn(z.shape, generator=rng) * jitter.view(-1, 1, 1, 1, 1) * std
        return (vae.decode(z).sample[:, :, 0] / 2 + 0.5).clamp(0, 1)
