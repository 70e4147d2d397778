"""The table and the picture of a comparison, from its `summary.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def table(record: Mapping[str, Any]) -> str:
    """Markdown: a row per contender, means with their 95 % interval of the difference to the first."""
    arms = record["arms"]
    measures = list(next(iter(arms.values()))["measures"])
    head = ["", "denoiser calls", "head calls", *measures, "diversity", "seconds"]
    rows = [_row(name, arm, measures) for name, arm in arms.items()]
    said = (
        f"{record['prompts']} prompts, seeds {', '.join(map(str, record['seeds']))}; brackets: difference to the first "
    )
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([f"{said}row, 95 % interval, paired by prompt.", "", *(f"| {' | '.join(r)} |" for r in lines)])


def _row(name: str, arm: Mapping[str, Any], measures: Sequence[str]) -> list[str]:
    cells = []
    for measure in measures:
        cell = f"{arm['measures'][measure]:.3f}"
        if measure in arm["against_first"]:
            interval = arm["against_first"][measure]
            cell += f" [{interval['low']:+.3f}, {interval['high']:+.3f}]"
        cells.append(cell)
    diversity = "" if arm["diversity"] is None else f"{arm['diversity']:.3f}"
    head = f"{arm['spent']['head']:.0f}" if arm["spent"]["head"] else ""
    return [name, f"{arm['calls']:.2f}", head, *cells, diversity, f"{arm['seconds']:.2f}"]


def picture(record: Mapping[str, Any], shown: Sequence[str], frontier: tuple[str, str] | None, out: Path) -> None:
    """Differences to the first contender with their intervals, and two measures against each other."""
    arms = record["arms"]
    first = next(iter(arms))
    measures = list(shown) or list(arms[first]["measures"])
    figure = Figure(figsize=(3.0 * len(measures) + (5.5 if frontier else 0) + 1.5, 0.42 * len(arms) + 1.4), dpi=100)
    figure.set_layout_engine("constrained")
    widths = [1.0] * len(measures) + ([1.7] if frontier else [])
    panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for number, (axes, measure) in enumerate(zip(panels, measures, strict=False)):
        _differences(axes, arms, measure, names=number == 0)
    if frontier is not None:
        _frontier(panels[-1], arms, frontier)
    figure.savefig(out)


def _differences(axes: Axes, arms: Mapping[str, Any], measure: str, names: bool) -> None:
    base = next(iter(arms.values()))["measures"][measure]
    axes.axvline(base, color="gray", linewidth=1)
    for place, arm in enumerate(arms.values()):
        value = arm["measures"][measure]
        if measure not in arm["against_first"]:
            axes.plot(value, place, "o", color="gray")
            continue
        interval = arm["against_first"][measure]
        value = base + interval["mean"]
        ends = [[max(0.0, interval["mean"] - interval["low"])], [max(0.0, interval["high"] - interval["mean"])]]
        sure = interval["low"] > 0 or interval["high"] < 0
        colour = ("C2" if value > base else "C3") if sure else "C7"
        axes.errorbar(value, place, xerr=ends, fmt="o", color=colour, capsize=3)
    axes.set_yticks(range(len(arms)), list(arms) if names else [""] * len(arms))
    axes.invert_yaxis()
    axes.set_title(measure, fontsize=10)
    axes.grid(axis="x", alpha=0.3)


def _frontier(axes: Axes, arms: Mapping[str, Any], pair: tuple[str, str]) -> None:
    for number, (name, arm) in enumerate(arms.items()):
        across, up = (arm["measures"][measure] for measure in pair)
        axes.plot(across, up, "osD^v"[number // 10 % 5], color=f"C{number % 10}", label=name)
        axes.annotate(name, (across, up), fontsize=7, xytext=(4, 3), textcoords="offset points")
    axes.set_xlabel(pair[0])
    axes.set_ylabel(pair[1])
    axes.grid(alpha=0.3)
