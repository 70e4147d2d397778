"""UnifiedReward (arXiv 2503.05236): a vision-language model taught to mark pictures and to compare them, in words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from alignkit.errors import RecipeError
from alignkit.rewards.card import Card
from alignkit.rewards.judges import Judge
from alignkit.rewards.ratings import PairJudge, number_in, report_unread
from alignkit.rewards.references import COLUMN
from alignkit.rewards.tiny_models import write_qwen_vl_that_says
from alignkit.types import Prompt

WEIGHTS = "CodeGoat24/UnifiedReward-qwen-7b"
LICENCE = "MIT"
COST = "8.3 B parameters; 33 GB, or 17 GB with dtype='bfloat16'; writes text"
PIXELS = 512 * 512
LOWEST, HIGHEST = 1, 5

FINAL = {"final": "Final Score:"}
ASPECTS = {
    "alignment": "Alignment Score (1-5):",
    "coherence": "Coherence Score (1-5):",
    "style": "Style Score (1-5):",
}
"""What stands before each mark in the model's replies: one of them, or three with `read="aspects"`."""

VERDICTS = ("Image 1 is better than Image 2.", "Image 2 is better than Image 1.", "Both images are equally good.")

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_VERDICT = re.compile(
    r"\b(?:image|video)\s*([12])\s+is\s+(?:the\s+)?better|(both\s+(?:images|videos)\s+are\s+equally\s+good)",
    re.IGNORECASE,
)


def marks_in(reply: str | None, markers: Sequence[str]) -> list[float]:
    """The mark from 1 to 5 behind each marker; NaN where there is none."""
    return [number_in(reply, marker, LOWEST, HIGHEST) for marker in markers]


def pair_verdict(reply: str) -> float:
    """1, 0 or 0.5 for "Image 1 is better", "Image 2 is better" or "Both images are equally good"; NaN for neither.

    The last such sentence counts, inside the last <answer> where there is one: the reasoning before it may say
    of a single aspect that the other is better.
    """
    answers = _ANSWER.findall(reply)
    found = _VERDICT.findall(answers[-1] if answers else reply)
    if not found:
        return math.nan
    which, _ = found[-1]
    return {"1": 1.0, "2": 0.0, "": 0.5}[which]


@dataclass(frozen=True, eq=False)
class UnifiedReward(Judge):
    """UnifiedReward's mark of one picture, divided by 5.

    The model writes its mark, so there is no gradient; a reply without one is a failure (NaN), never a mark.
    The question is alignkit's own. The published weights were trained with one wording each: put that text, with
    `{prompt}` in it, in a file of yours and give it as `template`.

    Attributes:
        marks: "final", one mark behind "Final Score:"; "aspects", three of them (alignment, coherence, style), as the
            later weights write.
        shares: with `marks="aspects"`, the share of each of the three in the score.
        max_tokens: how long a reply may be.
    """

    name: str = "unified_reward"
    weights: str = WEIGHTS
    max_pixels: int | None = PIXELS
    marks: str = "final"
    shares: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    max_tokens: int = 512
    differentiable: bool = field(default=False, init=False)
    card: ClassVar[Card] = Card(
        family="judge",
        summary="UnifiedReward gives the picture a good mark for its prompt",
        range="[0.2, 1]",
        licence=LICENCE,
        cost=COST,
        source="2503.05236",
    )
    default_question: ClassVar[str] = (
        "{image}\nThis {kind} was made for the caption: {prompt}\nMark how well it shows what the caption says and how "
        "good it looks, from 1 (worst) to 5 (best). End with the line\nFinal Score: your mark"
    )
    aspects_question: ClassVar[str] = (
        "{image}\nThis {kind} was made for the caption: {prompt}\nMark from 1 (worst) to 5 (best) how well it shows "
        "what the caption says (alignment), whether it is free of broken or impossible things (coherence), and how "
        "good it looks, whatever the caption says (style). Reply with three lines\nAlignment Score (1-5): mark\n"
        "Coherence Score (1-5): mark\nStyle Score (1-5): mark"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.marks not in ("final", "aspects"):
            raise RecipeError(f"judge {self.name!r}: marks={self.marks!r}; choose final or aspects")
        if len(self.shares) != 3 or min(self.shares) < 0 or not sum(self.shares) > 0:
            raise RecipeError(f"judge {self.name!r}: shares={self.shares}; expected three numbers of at least 0")

    @classmethod
    def tiny(cls, folder: Path) -> dict[str, Any]:
        """A random Qwen2.5-VL that writes all four marks, which ones depending on the picture."""
        marks = range(LOWEST, HIGHEST + 1)
        lines = [[f"{marker} {mark}\n" for mark in marks] for marker in (*ASPECTS.values(), *FINAL.values())]
        write_qwen_vl_that_says(folder, lines, seed=2)  # a seed with which pictures differ in their marks
        return {"weights": str(folder), "max_tokens": 8}

    @property
    def reads_logits(self) -> bool:
        return False

    @property
    def markers(self) -> dict[str, str]:
        """What stands before each mark, by the name of the mark."""
        return FINAL if self.marks == "final" else ASPECTS

    @property
    def own_question(self) -> str:
        return self.default_question if self.marks == "final" else self.aspects_question

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError naming the first prompt without a column that the question names."""
        for prompt in prompts:
            self.chat(prompt, {"image": torch.empty(3, 1, 1)})

    def components(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """(B,) marks from 1 to 5 by name; NaN where the reply has none."""
        chats = [self.chat(prompt, {"image": one}) for one, prompt in zip(media, prompts, strict=True)]
        replies = self.engine.texts(chats, self.max_tokens)
        rows = [marks_in(reply, list(self.markers.values())) for reply in replies]
        report_unread(replies, [sum(row) for row in rows], " and ".join(self.markers.values()), self.name)
        table = torch.tensor(rows, device=media.device).reshape(len(rows), len(self.markers))
        return dict(zip(self.markers, table.unbind(1), strict=True))

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) in [0.2, 1]."""
        marks = torch.stack(list(self.components(media, prompts).values()), dim=1)
        shares = [1.0] if self.marks == "final" else list(self.shares)
        return marks @ marks.new_tensor(shares) / sum(shares) / HIGHEST


@dataclass(frozen=True, eq=False)
class UnifiedRewardPair(PairJudge):
    """Which of two pictures UnifiedReward prefers, read from its sentence.

    One of three: "Image 1 is better than Image 2.", the other way round, or "Both images are equally good."; a reply
    with none of them is a failure (NaN). Fits `...-Think-...` weights too, whose verdict stands in <answer>.
    The question is alignkit's own; see `UnifiedReward` for the published wording.
    """

    name: str = "unified_reward_pair"
    weights: str = WEIGHTS
    max_pixels: int | None = PIXELS
    read: str = "text"
    max_tokens: int = 1024
    differentiable: bool = field(default=False, init=False)
    card: ClassVar[Card] = Card(
        family="judge",
        summary="UnifiedReward prefers the picture to the prompt's reference image, asked in both orders",
        range="[0, 1]",
        licence=LICENCE,
        cost=COST,
        columns=(COLUMN,),
        source="2503.05236; 2505.03318",
    )
    default_question: ClassVar[str] = (
        "Image 1: {first}\nImage 2: {second}\nBoth were made for the caption: {prompt}\nCompare how well they show "
        "what the caption says and how good they look. End with one of these sentences: Image 1 is better than "
        "Image 2. Image 2 is better than Image 1. Both images are equally good."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.read != "text":
            raise RecipeError(f"judge {self.name!r} writes its verdict; read={self.read!r} is for pair_judge")

    @classmethod
    def tiny(cls, folder: Path) -> dict[str, Any]:
        """A random Qwen2.5-VL that writes one of the three sentences, which one depending on the pictures."""
        write_qwen_vl_that_says(folder, [VERDICTS], seed=1)
        return {"weights": str(folder), "max_tokens": 4}

    def verdict(self, reply: str) -> float:
        return pair_verdict(reply)
