"""Which font a sign is drawn in, without any learnt model: a judge for style rewards."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from alignkit.errors import RewardError
from alignkit.rewards.loading import load_file
from alignkit.shipped import path
from alignkit.types import Prompt

world = load_file(path("recipes", "signs", "world.py"))
QUOTED = re.compile(r'"([A-Z]+)"')


def serif(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """(B,) 1 where the picture's shapes correlate more with the prompt's word in serif than in mono, else 0.

    The best of nine places counts for each font. A picture with a wrong letter is judged by its other letters.

    Raises:
        RewardError: a prompt quotes no word of the sign world.
    """
    return torch.tensor([float(_margin(picture, word_of(prompt)) > 0) for picture, prompt in zip(media, prompts)])


def word_of(prompt: Prompt) -> str:
    """The quoted word."""
    found = QUOTED.search(prompt)
    if found is None or len(found.group(1)) * world.CELL > world.WIDTH:
        raise RewardError(f"prompt {prompt.id} {str(prompt)!r} quotes no word of three to five capital letters")
    return found.group(1)


def _margin(picture: Tensor, word: str) -> float:
    shape = _standardised(picture.detach().float().mean(dim=0).flatten().unsqueeze(0))
    mono, serif = ((_templates(word, font) @ shape.T).max() for font in world.FINAL.fonts)
    return float(serif - mono)


@cache
def _templates(word: str, font: str) -> Tensor:
    """(9, H * W): the word's letters at every offset, standardised."""
    reach = range(-world.FINAL.max_offset, world.FINAL.max_offset + 1)
    drawn = [world.draw(world.Sign(word, "gray", font, offset=at)) for at in itertools.product(reach, reach)]
    return _standardised(rearrange(torch.from_numpy(np.stack(drawn)).float(), "n h w c -> n (h w) c").mean(dim=2))


def _standardised(rows: Tensor) -> Tensor:
    """Mean 0 and length 1."""
    rows = rows - rows.mean(dim=1, keepdim=True)
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-6)
