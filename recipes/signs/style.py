"""Writes the style folder of the sign world: `python recipes/signs/style.py assets/signs/style`.

Serif signs in all colours. The prompts name no font, and the generator draws both, so a reward for this style asks for
nothing that a prompt forbids.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from alignkit.rewards.loading import load_file
from alignkit.shipped import path

world = load_file(path("recipes", "signs", "world.py"))
SIGNS_PER_COLOUR = 3


def write(folder: Path, font: str = "serif", seed: int = 11) -> None:
    """SIGNS_PER_COLOUR signs of training words in each colour."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, (words, _) = np.random.default_rng(seed), world.split_words()
    for colour in world.COLOURS:
        for number in range(SIGNS_PER_COLOUR):
            sign = replace(world.random_sign(rng, words[rng.integers(len(words))], colour), font=font)
            Image.fromarray(world.draw(sign)).save(folder / f"{colour}-{number}.png", optimize=True)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
