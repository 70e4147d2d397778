"""Two rewards as one: a reward that counts only where a gate opens, and a model's reward mixed with a rule's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from alignkit.errors import RecipeError
from alignkit.objectives import shaping
from alignkit.rewards.base import Evaluation, Reward, ScoresGroups, evaluate
from alignkit.rewards.card import Card
from alignkit.rewards.loading import describe, load
from alignkit.rewards.parts import bound, check, files_of, prepare
from alignkit.rewards.weights import Files
from alignkit.types import Prompt


@runtime_checkable
class SaysUncertainty(Protocol):
    """A reward that knows how unsure it is, such as one with a Gaussian output."""

    def uncertainty(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) at least 0; the weight is `exp(-uncertainty)`."""
        ...


def both(owner: str, first: Any, second: Any) -> tuple[Reward, Reward]:
    """Two parts of one kind that score single samples. Raises RecipeError otherwise."""
    loaded = load(first), load(second)
    if loaded[0].kind != loaded[1].kind:
        kinds = ", ".join(f"{r.name!r} scores {r.kind}" for r in loaded)
        raise RecipeError(f"reward {owner!r} needs two rewards of one kind; {kinds}")
    for reward in loaded:
        if isinstance(reward, ScoresGroups):
            raise RecipeError(f"reward {owner!r} needs rewards of single samples; {reward.name!r} compares a group")
    return loaded


class Composed:
    """What rewards made of two have in common: everything that is not scored is asked of both. (A base class, because
    it is the same twelve lines in each.)"""

    name: str
    of: ClassVar[tuple[str, str]]  # the fields that hold the two

    @cached_property
    def parts(self) -> tuple[Reward, Reward]:
        """The two rewards. Raises RecipeError where they do not fit together."""
        return both(self.name, *(getattr(self, field) for field in self.of))

    @property
    def kind(self) -> str:
        return self.parts[0].kind

    @property
    def differentiable(self) -> bool:
        return self.parts[0].differentiable

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """As both parts'."""
        for part in self.parts:
            check(part, prompts)

    def files(self) -> tuple[Files, ...]:
        """As both parts'."""
        return files_of(self.parts)

    def prepare(self) -> None:
        """As both parts'."""
        for part in self.parts:
            prepare(part)

    def bind(self, policy: Any) -> Any:
        """The same of bound parts."""
        own = [bound(part, policy) for part in self.parts]
        if all(a is b for a, b in zip(own, self.parts, strict=True)):
            return self
        return dataclasses.replace(self, **dict(zip(self.of, own, strict=True)))  # type: ignore[type-var]

    def describe(self) -> dict[str, Any]:
        """Both parts."""
        return {field: describe(part) for field, part in zip(self.of, self.parts, strict=True)}


@dataclass(frozen=True, eq=False)
class Gated(Composed):
    """The reward where a second one reaches a threshold, a low constant where it does not.

    Attributes:
        reward: spec or callable; its gradient is the gated reward's.
        gate: spec or callable, such as a checklist or OCR; it only opens or not.
        threshold: of the gate's score, included.
        below: what a sample gets that does not pass; under every reward that can pass.
    """

    reward: Any = "brightness"
    gate: Any = "ocr"
    threshold: float = 0.5
    below: float = 0.0
    name: str = "gated"
    of: ClassVar[tuple[str, str]] = ("reward", "gate")
    card: ClassVar[Card] = Card(
        family="combined",
        summary="the first reward, where the second passes",
        range="as the first reward's, or `below`",
        cost="both rewards",
        source="PEARL",
    )
    _passed: list[torch.Tensor] = field(default_factory=list, init=False, repr=False)

    def counted(self) -> Mapping[str, float]:
        """`passed`: share of the samples that the gate let pass, since the last call."""
        passed = torch.cat(self._passed) if self._passed else torch.empty(0)
        self._passed.clear()
        return {"passed": float(passed.mean())} if len(passed) else {}

    def raw(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> Evaluation:
        """Applies where both do; a part that failed makes the sample fail."""
        reward, gate = (evaluate(part, media, prompts) for part in self.parts)
        self._passed.append((gate.scores.detach() >= self.threshold)[gate.applicable].double().cpu())
        scores = shaping.gated(reward.scores, gate.scores.detach(), self.threshold, self.below)
        return Evaluation(scores, reward.applicable & gate.applicable)

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,)."""
        return evaluate(self, media, prompts).scores


@dataclass(frozen=True, eq=False)
class Hybrid(Composed):
    """A model's reward and a rule's, averaged by how far each is trusted; where the rule does not apply, the model's.

    Attributes:
        reward: spec or callable of the model's reward.
        rule: spec or callable of a reward that is right where it applies (OCR, counts), on the same scale.
        confidence: in the model: a number, or "uncertainty" for `exp(-uncertainty)` of each sample, which the model's
            reward must offer (a reward with a Gaussian output does).
        rule_confidence: in the rule.
    """

    reward: Any = "brightness"
    rule: Any = "ocr"
    confidence: float | str = 1.0
    rule_confidence: float = 1.0
    name: str = "hybrid"
    of: ClassVar[tuple[str, str]] = ("reward", "rule")
    card: ClassVar[Card] = Card(
        family="combined",
        summary="a model's reward and a rule's agree that it is good",
        range="as the two rewards'",
        cost="both rewards",
    )

    def __post_init__(self) -> None:
        numbers = [self.rule_confidence, *([] if isinstance(self.confidence, str) else [self.confidence])]
        if min(numbers) < 0 or not all(map(math.isfinite, numbers)) or sum(numbers) == 0:
            raise RecipeError(
                f"reward {self.name!r}: confidence={self.confidence!r}, rule_confidence={self.rule_confidence!r}; "
                "expected numbers of at least 0, one of them above"
            )
        if isinstance(self.confidence, str) and self.confidence != "uncertainty":
            raise RecipeError(f"reward {self.name!r}: confidence={self.confidence!r}; a number or 'uncertainty'")

    @cached_property
    def parts(self) -> tuple[Reward, Reward]:
        loaded = super().parts
        if self.confidence == "uncertainty" and not isinstance(loaded[0], SaysUncertainty):
            raise RecipeError(
                f"reward {self.name!r}: {loaded[0].name!r} does not say how uncertain it is; give a number"
            )
        return loaded

    def raw(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> Evaluation:
        """Applies where one part does; a part that failed makes the sample fail."""
        model, rule = (evaluate(part, media, prompts) for part in self.parts)
        scores = shaping.hybrid(model.scores, rule.scores, self._confidence(media, prompts), self.rule_confidence)
        failed = model.failed | rule.failed
        return Evaluation(scores.masked_fill(failed, math.nan), model.applicable | rule.applicable)

    def _confidence(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor | float:
        if not isinstance(self.confidence, str):
            return self.confidence
        part = self.parts[0]
        assert isinstance(part, SaysUncertainty)
        with torch.no_grad():
            return (-part.uncertainty(media, prompts).float()).exp()

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,)."""
        return evaluate(self, media, prompts).scores
