"""The table, the picture and the page of a comparison, from its `summary.json`."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Guidance compared</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; white-space: nowrap }
div { overflow-x: auto } img { max-width: 100% }
</style>
<h1>Guidance compared</h1>
<p>{{ model }}. {{ said }}</p>
<div><table>{% for row in rows %}<tr>{% for cell in row %}
{% if loop.first %}<th>{% else %}<td>{% endif %}{{ cell }}
{% endfor %}</tr>{% endfor %}</table></div>
{% for picture in pictures %}<p><img alt="" src="data:image/png;base64,{{ picture }}"></p>{% endfor %}
</html>
"""


def write(folder: Path) -> Path:
    """`table.md`, `comparison.png` and `report.html` from a run folder's summary and samples; returns the last."""
    record = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    (folder / "table.md").write_text(table(record) + "\n", encoding="utf-8")
    picture(record, record["shown"], record["frontier"], folder / "comparison.png")
    pictures = [folder / name for name in ("comparison.png", "samples.png")]
    shown = [base64.b64encode(one.read_bytes()).decode() for one in pictures if one.is_file()]
    page = Environment(autoescape=True).from_string(PAGE)
    said, rows = sentence(record), rows_of(record)
    report = folder / "report.html"
    report.write_text(page.render(model=record["model"], said=said, rows=rows, pictures=shown), encoding="utf-8")
    return report


def sentence(record: Mapping[str, Any]) -> str:
    """What the numbers are."""
    seeds = ", ".join(map(str, record["seeds"]))
    return (
        f"{record['prompts']} prompts, seeds {seeds}; brackets: difference to the first row, 95 % interval, paired by "
        "prompt. Denoiser and head calls are those of one sample; denoiser calls in units of a plain sample's."
    )


def table(record: Mapping[str, Any]) -> str:
    """The rows as Markdown, below a sentence that says what they are."""
    head, *rest = rows_of(record)
    lines = [head, ["---"] * len(head), *rest]
    safe = [[cell.replace("|", "\\|") for cell in row] for row in lines]
    return "\n".join([sentence(record), "", *(f"| {' | '.join(row)} |" for row in safe)])


def rows_of(record: Mapping[str, Any]) -> list[list[str]]:
    """Header and a row per contender: means with their 95 % interval of the difference to the first."""
    arms, measures = record["arms"], measured(record)
    head = ["", "denoiser calls", "head calls", *measures, "diversity", "seconds"]
    return [head, *(_row(name, arm, measures) for name, arm in arms.items())]


def measured(record: Mapping[str, Any]) -> list[str]:
    """The measures of every contender."""
    first, *rest = (arm["measures"] for arm in record["arms"].values())
    return [measure for measure in first if all(measure in other for other in rest)]


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
    """Differences to the first contender with their intervals, and two measures against each other; of what is asked
    for, what was measured."""
    arms = record["arms"]
    known = measured(record)
    measures = [measure for measure in shown if measure in known] or known
    frontier = frontier if frontier is not None and set(frontier) <= set(known) else None
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
    axes.set_yticks(range(len(arms)), [plain(name) for name in arms] if names else [""] * len(arms))
    axes.invert_yaxis()
    axes.set_title(plain(measure), fontsize=10)
    axes.grid(axis="x", alpha=0.3)


def _frontier(axes: Axes, arms: Mapping[str, Any], pair: tuple[str, str]) -> None:
    for number, (name, arm) in enumerate(arms.items()):
        across, up = (arm["measures"][measure] for measure in pair)
        axes.plot(across, up, "osD^v"[number // 10 % 5], color=f"C{number % 10}", label=plain(name))
        axes.annotate(plain(name), (across, up), fontsize=7, xytext=(4, 3), textcoords="offset points")
    axes.set_xlabel(plain(pair[0]))
    axes.set_ylabel(plain(pair[1]))
    axes.grid(alpha=0.3)


def plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")
