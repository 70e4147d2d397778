"""The table of rewards for readers, generated from the cards of the classes: `python -m alignkit.rewards.catalogue`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

from alignkit.rewards.card import FAMILIES, Card
from alignkit.rewards.loading import find
from alignkit.rewards.table import TABLE

HEADER = ("reward", "scores", "range", "gradient", "default weights", "their licence", "cost", "a high score means")


def record_of(name: str) -> dict[str, Any]:
    """What the class behind a name says of itself; nothing is constructed and nothing is read from disk."""
    cls = find(name)
    card: Card = cls.card
    return {
        **dataclasses.asdict(card),
        "columns": list(card.columns),
        "kind": _declared(cls, "kind"),
        "differentiable": _declared(cls, "differentiable"),
        "weights": _defaults(cls).get("weights"),
    }


def _declared(cls: type, name: str) -> Any:
    """A class attribute; "its parts'" where it depends on what the reward is made of."""
    value = inspect.getattr_static(cls, name)
    return "its parts'" if isinstance(value, property) else value


def _defaults(cls: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}


def rows() -> Iterator[tuple[str, ...]]:
    """One row per reward, families in the order of `FAMILIES`."""
    records = {name: record_of(name) for name in TABLE}
    for family in FAMILIES:
        for name, record in records.items():
            if record["family"] != family:
                continue
            columns = f" (columns: {', '.join(record['columns'])})" if record["columns"] else ""
            yield (
                f"`{name}`",
                record["kind"],
                record["range"],
                str({True: "yes", False: ""}.get(record["differentiable"], record["differentiable"])),
                f"`{record['weights']}`" if record["weights"] else "",
                record["licence"],
                record["cost"],
                f"{record['summary']}{columns}",
            )


def markdown() -> str:
    """The table as the README shows it."""
    lines = [HEADER, tuple("---" for _ in HEADER), *rows()]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    import sys

    sys.stdout.write(f"{markdown()}\n")
