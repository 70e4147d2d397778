"""Texts that a prompt asks for, and how close a text that was read comes to them. No reader in here."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from rapidfuzz.distance import Levenshtein

from alignkit.errors import RewardError
from alignkit.types import Prompt

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


def normalise(text: str) -> str:
    """Case folded, without white space: what two texts are compared by."""
    return "".join(text.casefold().split())


def quoted(text: str) -> list[str]:
    """The texts between double quotes, straight or curly, in order; empty ones are left out."""
    found = (straight or curly for straight, curly in _QUOTED.findall(text))
    return [part for part in found if normalise(part)]


def target_of(prompt: Prompt) -> str:
    """The text a sample of this prompt should show.

    The column `target` (a text or a list of texts) wins over quotes. Several targets are joined in order,
    because a reader returns lines from top to bottom as one text and the order of a sign's lines matters.

    Raises:
        RewardError: the prompt has neither; names its line.
    """
    if "target" in prompt.columns:
        column = prompt.columns["target"]
        parts = list(column) if isinstance(column, (list, tuple)) else [column]
    else:
        parts = quoted(prompt)
    if not parts or not all(isinstance(part, str) and normalise(part) for part in parts):
        raise RewardError(
            f"prompt {prompt.id} (its line or row in the prompt file) names no text to draw: "
            f'{str(prompt)!r}. Put the text in double quotes, e.g. a sign that says "OPEN", or add a '
            "column `target`, a text or a list of texts"
        )
    return " ".join(parts)


def targets(prompts: Sequence[Prompt]) -> list[str]:
    """`target_of` for every prompt."""
    return [target_of(prompt) for prompt in prompts]


def similarity(reads: Sequence[str], wanted: Sequence[str]) -> torch.Tensor:
    """(B,) float32 in [0, 1]: 1 - Levenshtein distance / length of the longer text, after `normalise`.

    Text beyond the target costs as much as text that is missing. (Flow-GRPO's reward, arXiv 2505.05470,
    gives 1 to every text that contains the target and divides by the target's length alone, which rewards
    filling the image with words.)
    """
    pairs = zip(reads, wanted, strict=True)
    return torch.tensor([Levenshtein.normalized_similarity(normalise(a), normalise(b)) for a, b in pairs])


def exact(reads: Sequence[str], wanted: Sequence[str]) -> torch.Tensor:
    """(B,) float32, 1 where the text was read exactly (after `normalise`), else 0."""
    return torch.tensor([float(normalise(a) == normalise(b)) for a, b in zip(reads, wanted, strict=True)])
