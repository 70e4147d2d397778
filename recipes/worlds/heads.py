"""What the noise-aware heads of the worlds have in common: the frozen generator that they judge for, and the command
that measures them at each noise level, keeps and prints what it found, and draws it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from diffusers import DiffusionPipeline
from matplotlib.figure import Figure

from alignkit import Policy
from alignkit.shipped import resolved

LEVELS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)  # at which heads are measured
Curves = dict[str, list[float]]
"""Each measure of a head at every level of LEVELS."""


def frozen(model: str) -> Policy:
    """A generator whose denoiser is not trained.

    Args:
        model: folder, or `shipped:...`.
    """
    pipe = DiffusionPipeline.from_pretrained(resolved(model))
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.requires_grad_(False)
    return Policy(pipe)


def by_measure(rows: Sequence[Mapping[str, float]]) -> Curves:
    """One row of measures for each level, as curves."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def table(found: Mapping[str, Curves]) -> str:
    """Markdown: one line for each head and measure."""
    lines = [("head", "measure", *(f"{level:g}" for level in LEVELS)), ("---",) * (len(LEVELS) + 2)]
    for head, measures in found.items():
        lines += [(head, name, *(f"{value:.3f}" for value in values)) for name, values in measures.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(found: Mapping[str, Curves], panels: Mapping[str, str], lowest: float, out: Path) -> None:
    """Accuracy against the noise level; dotted: each side of a pair with its own noise.

    Args:
        panels: measure -> title, one panel each.
        lowest: accuracy at the bottom of the panels.
    """
    figure = Figure(figsize=(11, 3.6), dpi=100, layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for i, (head, measures) in enumerate(found.items()):
            axes.plot(LEVELS, measures[name], "o-", color=f"C{i}", label=head)
            if f"{name}, own noise" in measures:
                axes.plot(LEVELS, measures[f"{name}, own noise"], ":", color=f"C{i}")
        axes.axhline(0.5, color="gray", linewidth=0.8)
        axes.set(title=title, xlabel="noise level sigma", ylim=(lowest, 1.03))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out pairs in the right order")
    figure.axes[0].legend(frameon=False)
    figure.savefig(out)


def command(
    description: str | None,
    measured: Callable[[Mapping[str, Path]], Mapping[str, Curves]],
    panels: Mapping[str, str],
    lowest: float,
    arguments: Sequence[str] | None = None,
) -> None:
    """The command line of both worlds; `measured` takes the folders of trained heads by name."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heads", nargs="*", help="NAME=FOLDER of a trained head, such as noised=runs/x/model")
    parser.add_argument("--keep", type=Path, help="a .json of what was measured, to which these heads are added")
    parser.add_argument("--out", type=Path, help="the picture, .png")
    given = parser.parse_args(arguments)
    found = json.loads(given.keep.read_text("utf-8")) if given.keep is not None and given.keep.exists() else {}
    if given.heads:
        found |= measured({name: Path(folder) for name, folder in (one.split("=", 1) for one in given.heads)})
    if given.keep is not None:
        given.keep.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(table(found))
    if given.out is not None:
        draw(found, panels, lowest, given.out)
