"""Which tokens are an answer, and how probable an answer is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from alignkit.errors import RecipeError

_WORD_STARTS = "Ġ▁ "
"""How tokenizers write a space before a word: byte-level BPE, SentencePiece, plainly."""


def spellings(tokenizer: Any, answers: Sequence[str]) -> list[list[int]]:
    """For every answer the token ids that a reply with it may begin with.

    These are all tokens that are the answer as a whole, in any case, with or without a space before it ("yes",
    " Yes", "YES"). Where some answer is no single token of this tokenizer, all are told apart by their first token,
    without those that two answers share (a space, the "1" of "1" and "10").

    Args:
        answers: short ASCII texts, such as "yes" and "no", or digits.

    Raises:
        RecipeError: an answer has no token that is only its own.
    """
    return _spellings(tokenizer, tuple(answers))


@lru_cache(maxsize=64)  # a vocabulary has 150,000 tokens
def _spellings(tokenizer: Any, answers: tuple[str, ...]) -> list[list[int]]:
    wanted = [answer.strip().casefold() for answer in answers]
    whole: dict[str, list[int]] = defaultdict(list)
    for piece, token in tokenizer.get_vocab().items():
        word = piece.lstrip(_WORD_STARTS).casefold()
        if word in wanted:
            whole[word].append(token)
    if all(word in whole for word in wanted):
        return [sorted(whole[word]) for word in wanted]
    firsts = [_first_tokens(tokenizer, word) for word in wanted]
    own = [ids - set().union(*firsts[:i], *firsts[i + 1 :]) for i, ids in enumerate(firsts)]
    for answer, ids in zip(answers, own, strict=True):
        if not ids:
            raise RecipeError(
                f"the answer {answer!r} begins with the same token as another of {', '.join(answers)} in this "
                "model's tokenizer; choose answers that begin differently (digits 0 to 9), or read the reply as text"
            )
    return [sorted(ids) for ids in own]


def _first_tokens(tokenizer: Any, word: str) -> set[int]:
    cased = {word, word.capitalize(), word.upper()}
    written = [space + text for text in cased for space in ("", " ")]
    encoded = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in written)
    return {ids[0] for ids in encoded if ids}


def log_mass(logits: torch.Tensor, groups: Sequence[Sequence[int]]) -> torch.Tensor:
    """(B, A) log of the softmax mass of each group of tokens.

    Args:
        logits: (B, V).
        groups: A lists of token ids.
    """
    log_probabilities = logits.log_softmax(1)
    return torch.stack([log_probabilities[:, list(ids)].logsumexp(1) for ids in groups], dim=1)
