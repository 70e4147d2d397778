"""A judge that goes through a list of yes/no questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.card import Card
from alignkit.rewards.judges import COST, LICENCE, Judge, fill
from alignkit.rewards.vision_language import probability
from alignkit.types import Prompt

COLUMN = "checklist"
KEYS = ("question", "weight", "must")

Entry = str | Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One line of a checklist.

    Attributes:
        question: with places, as of any judge; yes is good.
        weight: at least 0.
        must: where the answer is no, the whole score is 0.
    """

    question: str
    weight: float = 1.0
    must: bool = False


def items_of(entries: Sequence[Entry], owner: str) -> tuple[Item, ...]:
    """The lines that a recipe or a column of the prompt file spells out.

    Args:
        entries: texts, or mappings with `question` and perhaps `weight` and `must`.
        owner: whose they are, for the error.

    Raises:
        RecipeError: none, an entry that is neither, an unknown key, or weights that are negative or all 0.
    """
    items: list[Item] = []
    for entry in entries:
        written = {"question": entry} if isinstance(entry, str) else entry
        if not isinstance(written, Mapping) or "question" not in written or set(written) - set(KEYS):
            raise RecipeError(
                f"{owner}: {entry!r} is no line of a checklist; give a text, or {', '.join(KEYS)} by name"
            )
        items.append(Item(**written))
    if not items or min(item.weight for item in items) < 0 or not sum(item.weight for item in items) > 0:
        raise RecipeError(f"{owner}: a checklist needs questions whose weights are at least 0 and not all 0")
    return tuple(items)


def checklist_score(yes: torch.Tensor, items: Sequence[Item]) -> torch.Tensor:
    """() weighted mean of the (K,) probabilities of yes, in [0, 1]; 0 where a question that must be answered yes has
    a probability below one half."""
    weights = torch.tensor([item.weight for item in items], dtype=yes.dtype, device=yes.device)
    passed = all(not item.must or not bool(p < 0.5) for item, p in zip(items, yes.detach(), strict=True))
    return (weights @ yes) / weights.sum() * passed


@dataclass(frozen=True, eq=False)
class Checklist(Judge):
    """The share of yes/no questions, by weight, that a judge answers with yes.

    Every question is asked on its own, and its probability of yes read as by YesProbability. A line with `must` is a
    gate: where it fails the score is 0 and has no gradient. NaN where a server left a question unanswered.

    Attributes:
        questions: the lines, for every prompt that has no column `checklist` of its own: texts, or mappings such as
            `{"question": "Are there {count} dogs?", "weight": 2, "must": True}`.
        question: what is said around each line, with the place `{item}`.
    """

    name: str = "checklist"
    questions: tuple[Entry, ...] = (
        {"question": "Is everything in the picture that the caption names?", "weight": 2.0},
        {"question": "Are numbers, colours and places of things as the caption says?", "weight": 2.0},
        "Is the picture free of things that are broken, doubled or melted into each other?",
        "Is the picture sharp and well exposed?",
    )
    card: ClassVar[Card] = Card(
        family="judge",
        summary="the judge answers yes to the questions of a checklist",
        range="[0, 1]",
        licence=LICENCE,
        cost=f"{COST}; one question at a time",
        columns=(f"{COLUMN}?",),
        source="VisionReward, 2412.21059, with weights of the user's",
    )
    default_question: ClassVar[str] = "Caption: {prompt}\n{item} Reply with one word, yes or no."

    def __post_init__(self) -> None:
        super().__post_init__()
        items_of(self.questions, f"judge {self.name!r}")

    def items(self, prompt: Prompt) -> tuple[Item, ...]:
        """The lines for this prompt. Raises RecipeError where its column cannot be read."""
        column = prompt.columns.get(COLUMN)
        if column is None:
            return items_of(self.questions, f"judge {self.name!r}")
        entries = [column] if isinstance(column, (str, Mapping)) else list(column)
        return items_of(entries, f"prompt {prompt.id} (its line or row in the prompt file), column {COLUMN!r}")

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError naming the first prompt whose checklist cannot be asked."""
        for prompt in prompts:
            try:
                self._chats(torch.empty(3, 1, 1), prompt)
            except RecipeError as error:
                raise RewardError(str(error)) from error

    def _chats(self, one: torch.Tensor, prompt: Prompt) -> list[Any]:
        lines = [_text_of(fill(item.question, prompt, {}, self.words)) for item in self.items(prompt)]
        return [fill(self.asked, prompt, {"image": one}, {**self.words, "item": line}) for line in lines]

    def answers(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        """For every sample (K,) probabilities of yes, in the order of its checklist."""
        asked = [self._chats(one, prompt) for one, prompt in zip(media, prompts, strict=True)]
        log_probabilities = self.engine.log_probabilities([chat for chats in asked for chat in chats], ("yes", "no"))
        yes = probability(log_probabilities)[:, 0]
        return list(yes.split([len(chats) for chats in asked])) if asked else []

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) in [0, 1]."""
        answered = zip(self.answers(media, prompts), prompts, strict=True)
        scores = [checklist_score(yes, self.items(prompt)) for yes, prompt in answered]
        return torch.stack(scores) if scores else media.new_zeros(0)


def _text_of(chat: Any) -> str:
    return "".join(chat.texts)
