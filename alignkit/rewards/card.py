"""What the table of rewards says of each: one card per class, from which the README's table is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from alignkit.rewards.weights import Files


@dataclass(frozen=True)
class Card:
    """What a user wants to know of a reward before loading it.

    Attributes:
        family: "preference", "features", "text", "composition", "judge", "self", "video", "combined" or
            "statistics".
        summary: one line, what a high score means.
        range: of the scores, such as "[0, 1]" or "about 18 to 24".
        licence: of the default weights; "" where there are none.
        cost: parameters and memory of the default weights, or what a call takes.
        columns: columns of the prompt file that it needs, or can use ("boxes?").
        source: paper or place of the formula.
    """

    family: str
    summary: str
    range: str
    licence: str = ""
    cost: str = ""
    columns: tuple[str, ...] = ()
    source: str = ""


FAMILIES = ("preference", "features", "text", "composition", "judge", "self", "video", "combined", "statistics")


@runtime_checkable
class HasCard(Protocol):
    """A reward that describes itself for the table."""

    card: ClassVar[Card]


@runtime_checkable
class HasWeights(Protocol):
    """A reward whose networks come from files that may have to be fetched."""

    def files(self) -> Sequence[Files]:
        """Everything that it reads, tokenizers included, as it is configured."""
        ...


@runtime_checkable
class HasTiny(Protocol):
    """A reward that can be tried with tiny random weights, through the code that loads the real ones."""

    @classmethod
    def tiny(cls, folder: Path) -> Mapping[str, Any]:
        """Write random weights in the published layout into `folder`; returns the options that load them."""
        ...
