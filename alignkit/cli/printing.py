"""What commands print: tables, JSON, and no progress bars where nobody looks."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def print_json(record: Any) -> int:
    print(json.dumps(record, indent=1, allow_nan=False))
    return 0


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table in a terminal, lines with tabs elsewhere, so that other programs can read them."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        for row in ([header] if header else []) + list(rows):
            print("\t".join(str(cell) for cell in row))
        return
    table = Table(title=title or None, show_header=bool(header), title_justify="left")
    rows = list(rows)
    for name in header or [""] * len(rows[0]):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(_escaped(str(cell)) for cell in row))
    console.print(table)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def no_loading_bars() -> None:
    """Bars of diffusers and transformers belong into a terminal, not into a log file."""
    if sys.stderr.isatty():
        return
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
