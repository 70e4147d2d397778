"""The table of rewards for readers, generated from the cards of the classes: `python -m alignkit.rewards.catalogue`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

from alignkit.rewards.card import FAMILIES, Card, HasWeights
from alignkit.rewards.loading import find, load
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
        "weights": _weights(name, cls),
    }


def _declared(cls: type, name: str) -> Any:
    """A class attribute; "its parts'" where it depends on what the reward is made of."""
    value = inspect.getattr_static(cls, name)
    return "its parts'" if isinstance(value, property) else value


def _weights(name: str, cls: type) -> list[str]:
    """Hub ids that the default options read."""
    if not issubclass(cls, HasWeights):
        return []
    empty = inspect.Parameter.empty
    if any(parameter.default is empty for parameter in inspect.signature(cls).parameters.values()):
        return [str(f.default) for f in dataclasses.fields(cls) if f.name == "weights"]  # type: ignore[arg-type]
    reward = load(name)
    return list(dict.fromkeys(one.source for one in reward.files())) if isinstance(reward, HasWeights) else []


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
                ", ".join(f"`{source}`" for source in record["weights"]),
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
