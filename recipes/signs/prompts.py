"""Writes the prompt files of the sign world: `python recipes/signs/prompts.py assets/signs`.

Training prompts name every training word in two colours, held-out prompts every held-out word in one; seeded.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path


def prompts(world: dict, words: str, colours_per_word: int, seed: int) -> list[str]:
    """Prompts for `world[words]`, each word in some of the world's colours."""
    rng, names = random.Random(seed), list(world["colours"])
    lines = [
        world["template"].format(colour=colour, word=word)
        for word in world[words]
        for colour in rng.sample(names, colours_per_word)
    ]
    rng.shuffle(lines)
    return lines


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    world = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    for file, words, count in (("train.txt", "train_words", 2), ("held_out.txt", "held_out_words", 1)):
        (folder / file).write_text("\n".join(prompts(world, words, count, seed=7)) + "\n", encoding="utf-8")
