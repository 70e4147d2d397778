"""Curves as SVG text for a page: no pyplot, no global state, text stays text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from alignkit.evaluation.motion import Band
from alignkit.evaluation.record import Series

TRAINED = "#2563a8"
HELD_OUT = "#c2570c"
OTHERS = ("#4b5563", "#0f766e", "#7c3aed", "#9d174d")
GUIDANCE = "#6b7280"
SMALLEST_SPAN = 0.1  # of the vertical axis, as a share of the largest value

_STYLE: dict[Any, Any] = {  # matplotlib types the keys as a literal of its own
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.parse_math": False,  # a `$` in a name is a dollar
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#4b5563",
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.6,
}


def line_plot(lines: Mapping[str, Series], colours: Sequence[str], levels: Mapping[str, float] | None = None) -> str:
    """One panel of curves over steps, as an `<svg>` element.

    Args:
        lines: by label, in drawing order; each needs at least one point.
        colours: one per line.
        levels: labelled dashed horizontal lines.
    """
    with _panel(list(lines), "step") as panel:
        for (label, series), colour in zip(lines.items(), colours, strict=True):
            _draw(panel.axes, label, series, colour)
        for label, value in (levels or {}).items():
            panel.axes.axhline(value, color=GUIDANCE, linewidth=1, linestyle=(0, (4, 3)), label=label)
        _widen(panel.axes, SMALLEST_SPAN * max(abs(value) for series in lines.values() for value in series.values))
        _name(panel.axes, len(lines) + len(levels or {}))
    return panel.svg


def band_plot(bands: Mapping[str, Band], colours: Sequence[str]) -> str:
    """One panel of means over the frames of clips, each in a band of one standard deviation over the clips.

    Args:
        bands: by label, in drawing order.
        colours: one per band.
    """
    with _panel(list(bands), "frame") as panel:
        for (label, band), colour in zip(bands.items(), colours, strict=True):
            low = [mean - std for mean, std in zip(band.mean, band.std, strict=True)]
            high = [mean + std for mean, std in zip(band.mean, band.std, strict=True)]
            panel.axes.fill_between(band.steps, low, high, color=colour, alpha=0.16, linewidth=0)
            alone = "o" if len(band.steps) == 1 else ""  # a line through one point is not seen
            panel.axes.plot(band.steps, band.mean, color=colour, linewidth=1.6, marker=alone, label=label)
        if all(mean >= 0 for band in bands.values() for mean in band.mean):
            panel.axes.set_ylim(bottom=0)
        panel.axes.xaxis.get_major_locator().set_params(integer=True)
        _name(panel.axes, len(bands))
    return panel.svg


class _Panel:
    """Axes to draw on, and when that is done the `<svg>` element."""

    def __init__(self, axes: Any) -> None:
        self.axes = axes
        self.svg = ""


@contextmanager
def _panel(labels: Sequence[str], across: str) -> Iterator[_Panel]:
    """An empty panel; what was drawn on it is its `svg` at the end."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "/".join(labels)}):
        figure = Figure(figsize=(3.7, 2.15))
        figure.subplots_adjust(left=0.135, right=0.98, top=0.97, bottom=0.17)
        panel = _Panel(figure.add_subplot())
        panel.axes.set_xlabel(across, labelpad=1)
        panel.axes.margins(x=0.02)
        panel.axes.yaxis.set_major_formatter("{x:.4g}")  # no multiplier above the axis, where there is no room
        yield panel
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
        panel.svg = _element(text.getvalue())


def _name(axes, curves: int) -> None:
    """A legend where there is more than one curve."""
    if curves > 1:
        axes.legend(frameon=False, fontsize=7.5, handlelength=1.4, borderaxespad=0.1)


def _draw(axes, label: str, series: Series, colour: str) -> None:
    """Few points get markers; many noisy ones a faint line under their running mean."""
    many = len(series.values) > 20
    if not many:
        axes.plot(series.steps, series.values, color=colour, linewidth=1.5, marker="o", markersize=2.6, label=label)
        return
    axes.plot(series.steps, series.values, color=colour, linewidth=0.7, alpha=0.35)
    axes.plot(series.steps, running_mean(series.values), color=colour, linewidth=1.6, label=label)


def _widen(axes, span: float) -> None:
    """Show at least `span` of the vertical axis, so that a change of one percent does not look like a collapse."""
    low, high = axes.get_ylim()
    spare = (span - (high - low)) / 2
    if spare > 0:
        axes.set_ylim(low - spare, high + spare)


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of a tenth of the run; the window is cut at the ends."""
    half = max(1, len(values) // 20)
    means = []
    for i in range(len(values)):
        window = values[max(0, i - half) : i + half + 1]
        means.append(sum(window) / len(window))
    return means


def _element(svg: str) -> str:
    """The `<svg>` element alone, with a size that follows its box."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1).strip()
