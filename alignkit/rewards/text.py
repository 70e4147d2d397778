"""Texts that a prompt asks for, and how close a text that was read comes to them. No reader in here.

What is compared: texts in Unicode's composed form, case folded (`OPEN`, `Open` and `open` are one text, `STRASSE`
and `straße` too; accents count), without any white space, because readers disagree about spaces between letters
that stand apart. Punctuation and digits count like letters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from rapidfuzz.distance import Levenshtein

from alignkit.errors import RecipeError, RewardError
from alignkit.types import Prompt

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')
FORMULAS = ("edit", "flow_grpo")
MOST_IN_ANY_ORDER = 5  # 120 orders of each prompt's targets are tried
_UNIT = 100  # rapidfuzz weighs edits with whole numbers: extra_text counts in hundredths


def normalise(text: str) -> str:
    """What two texts are compared by; see the top of this file."""
    return "".join(unicodedata.normalize("NFC", text).casefold().split())


def quoted(text: str) -> list[str]:
    """The texts between double quotes, straight or curly, in order; empty ones are left out."""
    found = (straight or curly for straight, curly in _QUOTED.findall(text))
    return [part for part in found if normalise(part)]


def parts_of(prompt: Prompt) -> list[str]:
    """The texts a sample of this prompt should show, in order: the column `target` (a text or a list), else quotes.

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
    return parts


def target_of(prompt: Prompt) -> str:
    """`parts_of` as one text, because a reader returns lines from top to bottom as one text.

    Raises:
        RewardError: as `parts_of`.
    """
    return " ".join(parts_of(prompt))


def targets(prompts: Sequence[Prompt]) -> list[str]:
    """`target_of` for every prompt."""
    return [target_of(prompt) for prompt in prompts]


def similarity(reads: Sequence[str], wanted: Sequence[str]) -> torch.Tensor:
    """(B,) float32 in [0, 1]: 1 - Levenshtein distance / length of the longer text, after `normalise`.

    Text beyond the target costs as much as text that is missing. (Flow-GRPO's reward, `flow_grpo_similarity`,
    gives 1 to every text that contains the target and divides by the target's length alone, which rewards
    filling the image with words.)
    """
    pairs = zip(reads, wanted, strict=True)
    return torch.tensor([edit_similarity(read, target) for read, target in pairs])


def edit_similarity(read: str, target: str, extra_text: float = 1.0) -> float:
    """1 - distance / (len(target) + extra_text * letters beyond it), in [0, 1], after `normalise`.

    Args:
        extra_text: what a letter too many costs; one that is missing or wrong costs 1. With 1 this is
            1 - Levenshtein distance / length of the longer text; above 0, text around a target always costs.
    """
    read, target = normalise(read), normalise(target)
    if extra_text == 1.0:
        return Levenshtein.normalized_similarity(read, target)
    extra = round(extra_text * _UNIT)
    # From `read` to `target`: inserting is what is missing, deleting is what is too much.
    distance = Levenshtein.distance(read, target, weights=(_UNIT, extra, _UNIT))
    return 1 - distance / (_UNIT * len(target) + extra * max(0, len(read) - len(target)))


def best_order_similarity(read: str, parts: Sequence[str], extra_text: float = 1.0) -> float:
    """`edit_similarity` to the parts in the order that fits best.

    The whole of what was read is compared with the whole of what was asked. (A mean over targets of each one's
    best match would let one word serve two targets that look alike, and would have to price text in between
    separately.)
    """
    return max(edit_similarity(read, "".join(order), extra_text) for order in set(permutations(parts)))


def flow_grpo_similarity(read: str, target: str, substring: bool = True) -> float:
    """1 - min(distance, n) / n with n = len(target), as published with Flow-GRPO (arXiv 2505.05470).

    Lower case, spaces removed. It does not see text beyond the target once `substring` finds it: a picture full
    of words scores 1. Kept to compare with published numbers.

    Args:
        substring: a text that contains the target has distance 0; True for images, False for video.
    """
    read, target = (text.replace(" ", "").lower() for text in (read, target))
    distance = 0 if substring and target in read else Levenshtein.distance(read, target)
    return 1 - min(distance, len(target)) / len(target)


def flow_grpo_target(prompt: Prompt) -> str:
    """What stands between the prompt's first two straight double quotes; the column `target` has no say.

    Raises:
        RewardError: there is none, or only spaces.
    """
    pieces = prompt.split('"')
    if len(pieces) < 2 or not pieces[1].replace(" ", ""):
        raise RewardError(
            f"prompt {prompt.id} (its line or row in the prompt file) has no text between straight double quotes: "
            f"{str(prompt)!r}; formula='flow_grpo' reads nothing else. Quote it, or choose formula='edit'"
        )
    return pieces[1]


@dataclass(frozen=True)
class Match:
    """How texts that were read are scored against prompts.

    Attributes:
        formula: "edit" (`edit_similarity`) or "flow_grpo" (`flow_grpo_similarity`).
        extra_text: above 0 up to 1, of "edit".
        ordered: of "edit": several targets must be read in the prompt's order; False takes the order that fits
            best, of at most 5 targets.
        substring: of "flow_grpo".

    Raises:
        RecipeError: values outside these.
    """

    formula: str = "edit"
    extra_text: float = 1.0
    ordered: bool = True
    substring: bool = True

    def __post_init__(self) -> None:
        if self.formula not in FORMULAS:
            raise RecipeError(f"formula={self.formula!r}; choose one of {', '.join(FORMULAS)}")
        if not 1 / _UNIT <= self.extra_text <= 1:
            raise RecipeError(
                f"extra_text={self.extra_text}; expected {1 / _UNIT} to 1: at 0 a picture full of words would win"
            )
        if self.formula != "edit" and (self.extra_text != 1 or not self.ordered):
            raise RecipeError(f"extra_text and ordered belong to formula='edit'; formula={self.formula!r} has neither")

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError naming the first prompt that cannot be scored."""
        for prompt in prompts:
            if self.formula == "flow_grpo":
                flow_grpo_target(prompt)
            elif len(parts_of(prompt)) > MOST_IN_ANY_ORDER and not self.ordered:
                raise RewardError(
                    f"prompt {prompt.id} has {len(parts_of(prompt))} targets; ordered=False takes at most "
                    f"{MOST_IN_ANY_ORDER}. Choose ordered=True or quote fewer"
                )

    def scores(self, reads: Sequence[str], prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) float32 in [0, 1]."""
        self.check(prompts)
        return torch.tensor([self._score(read, prompt) for read, prompt in zip(reads, prompts, strict=True)])

    def _score(self, read: str, prompt: Prompt) -> float:
        if self.formula == "flow_grpo":
            return flow_grpo_similarity(read, flow_grpo_target(prompt), self.substring)
        if self.ordered:
            return edit_similarity(read, target_of(prompt), self.extra_text)
        return best_order_similarity(read, parts_of(prompt), self.extra_text)


def exact(reads: Sequence[str], wanted: Sequence[str]) -> torch.Tensor:
    """(B,) float32, 1 where the text was read exactly (after `normalise`), else 0."""
    return torch.tensor([float(normalise(a) == normalise(b)) for a, b in zip(reads, wanted, strict=True)])
