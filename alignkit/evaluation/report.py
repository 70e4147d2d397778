"""`report.html`: what a run did, on one page that works offline and executes nothing."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from alignkit.evaluation import monitors, plots
from alignkit.evaluation.monitors import Statistic
from alignkit.evaluation.motion import Band
from alignkit.evaluation.pictures import Shown, masked, measure, show
from alignkit.evaluation.record import Change, Grid, Picture, RunRecord, Series, as_changes, read_run

MAX_PICTURES = 64  # per grid


@dataclass(frozen=True)
class Card:
    """One reward or judge: base, base with guidance, aligned, and the same with the pipeline's own scheduler."""

    name: str
    kind: str  # "trained", "judge" or "so far"
    change: Change
    guidance: float | None
    own: Change | None

    @property
    def tone(self) -> str:
        """How the change is coloured."""
        if monitors.fell(self.change):
            return "slipped" if self.kind == "held out" else "fell"  # a reward model may have to forget something
        if self.change.before == self.change.after:
            return "flat"
        return "rose" if monitors.rose(self.change) else "slipped"

    def place(self, value: float) -> float:
        """Where `value` lies on the card's scale, in percent; the scale covers [0, 1] or all values shown."""
        values = [v for v in (self.change.before, self.change.after, self.guidance) if v is not None]
        low, high = min([0.0, *values]), max([*values, 1.0 if max(values) <= 1 and min(values) >= 0 else 0.0])
        return 100 * (value - low) / ((high - low) or 1.0)


@dataclass(frozen=True)
class Part:
    """One line of the diversity table; `width` is after / before in percent, at most 150."""

    name: str
    change: Change
    ratio: float | None
    narrowed: bool

    @property
    def width(self) -> float:
        return min(150.0, 100 * (self.ratio or 0.0))


@dataclass(frozen=True)
class Panel:
    title: str
    svg: str


@dataclass(frozen=True)
class Case:
    """The same prompt and seed by every model: one picture per grid, None where a grid has no such picture."""

    prompt: str
    cells: tuple[tuple[str, Shown | None], ...]


def write_report(run_dir: Path) -> Path:
    """Build `report.html` from whatever the run directory holds; what is missing is said on the page.

    Args:
        run_dir: a run directory as design.md describes it: `summary.json`, `metrics.jsonl`, `recipe.json`,
            `env.json` and `samples/index.json`, each of which may be missing.

    Returns:
        The path of the page: one file with pictures and plots inside, no scripts, nothing from the network.

    Raises:
        CheckpointError: `run_dir` does not exist.
    """
    record = read_run(Path(run_dir))
    page = record.folder / "report.html"
    unfinished = page.with_suffix(".html.tmp")
    unfinished.write_text(render(record), encoding="utf-8")
    os.replace(unfinished, page)
    return page


def render(record: RunRecord) -> str:
    """The page as text; everything that came from the run is escaped by the template."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("alignkit.evaluation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = show_number
    samples = record.folder / "samples"
    found = {grid.title: measure(grid.pictures[:MAX_PICTURES], samples) for grid in record.grids}
    measured = {title: values.statistics for title, values in found.items() if values.statistics}
    return environment.get_template("report.html.j2").render(
        name=record.folder.resolve().name,
        summary=record.summary,
        steps=max((series.steps[-1] for series in record.metrics.values() if series.steps), default=None),
        missing=record.missing,
        findings=monitors.findings(record, measured),
        cards=cards(record),
        notes=[(grid.title, grid.note) for grid in record.grids],
        cases=cases(record.grids, samples),
        sheets=sheets(record.grids, samples),
        motion_panels=motion_panels({title: values.bands for title, values in found.items() if values.bands}),
        hidden=max((len(grid.pictures) - MAX_PICTURES for grid in record.grids), default=0),
        reward_panels=reward_panels(record),
        policy_panels=policy_panels(record.metrics),
        statistics=statistics_table(measured),
        diversity=[(title, parts) for title, parts in diversity_tables(record) if parts],
        env=[(key, masked(value)) for key, value in flat(record.env) if key != "command"],
        recipe=masked(json.dumps(record.recipe, indent=2, ensure_ascii=False)) if record.recipe else "",
        commands=commands(record),
    )


def cards(record: RunRecord) -> list[Card]:
    """Trained rewards, then judges, or a reward model's measures; without a summary, the held-out metrics so far."""
    guidance, own = monitors.guidance_baseline(record), record.changes("own_scheduler")
    found = [
        Card(name, kind, change, guidance.get(name), own.get(name))
        for kind, entry in (("trained", "rewards"), ("judge", "judges"), ("held out", "measures"))
        for name, change in record.changes(entry).items()
        if change.before is not None or change.after is not None
    ]
    if found:
        return found
    prefix = "heldout/"
    kept = {key: s for key, s in record.metrics.items() if key not in monitors.DISTANCES}
    series = {key.removeprefix(prefix): s for key, s in kept.items() if key.startswith(prefix)}
    return [
        Card(name, "so far", Change(s.values[0], s.values[-1]), None, None) for name, s in series.items() if s.values
    ]


def cases(grids: tuple[Grid, ...], samples: Path) -> list[Case]:
    """Pictures of the same prompt side by side: the n-th picture of a prompt belongs to the n-th of the others."""
    shown: dict[tuple[str, int], dict[int, Shown]] = {}
    for index, grid in enumerate(grids):
        count: Counter[str] = Counter()
        for picture in grid.pictures[:MAX_PICTURES]:
            key = (picture.prompt, count[picture.prompt])
            shown.setdefault(key, {})[index] = show(picture, samples)
            count[picture.prompt] += 1
    return [
        Case(prompt, tuple((grid.title, row.get(index)) for index, grid in enumerate(grids)))
        for (prompt, _), row in shown.items()
    ]


def sheets(grids: tuple[Grid, ...], samples: Path) -> list[tuple[str, Shown]]:
    """The sheets of frames, by title."""
    return [(g.title, show(Picture(g.sheet, g.title, {}, None), samples)) for g in grids if g.sheet is not None]


def motion_panels(bands: Mapping[str, Mapping[str, Band]]) -> list[Panel]:
    """What clips do from frame to frame, a curve for each grid that has clips."""
    titles = {
        "flow": "optical flow, pixels per frame",
        "brightness": "brightness around the clip's mean",
    }
    between = islice(cycle(plots.OTHERS[1:]), max(0, len(bands) - 2))
    colours = [plots.GUIDANCE, *between, plots.TRAINED][: len(bands)]
    return [
        Panel(title, plots.band_plot({grid: curves[name] for grid, curves in bands.items()}, colours))
        for name, title in titles.items()
        if bands
    ]


def reward_panels(record: RunRecord) -> list[Panel]:
    """One panel per reward: on training prompts in one colour, on held-out prompts in another."""
    guidance = monitors.guidance_baseline(record)
    areas = (("reward/", "training prompts", plots.TRAINED), ("heldout/", "held-out prompts", plots.HELD_OUT))
    rewards = [key for key in record.metrics if key not in monitors.DISTANCES]
    names = [key.partition("/")[2] for area, *_ in areas for key in rewards if key.startswith(area)]
    panels = []
    for name in dict.fromkeys(names):
        lines = {label: (record.metrics.get(area + name), colour) for area, label, colour in areas}
        drawn = {label: (s, colour) for label, (s, colour) in lines.items() if s is not None and s.values}
        if drawn:
            level = {"base with guidance": guidance[name]} if name in guidance else None
            series = {label: s for label, (s, _) in drawn.items()}
            svg = plots.line_plot(series, [colour for _, colour in drawn.values()], level)
            panels.append(Panel(name, svg))
    return panels


def policy_panels(metrics: Mapping[str, Series]) -> list[Panel]:
    """Distances and ratio first, the clip fractions together, then every other metric that is not a reward."""
    together = {
        **{title: [key] for key, title in monitors.DISTANCES.items()},
        "KL to the reference": ["policy/kl"],
        "max |ratio - 1|": ["policy/ratio_first_dev", "policy/ratio_max_dev"],
        "clipped share": ["policy/clip_low", "policy/clip_high"],
        "groups without spread": ["groups/zero_std_fraction"],
    }
    placed = {key for keys in together.values() for key in keys}
    others = [key for key in metrics if key not in placed and not key.startswith(("reward/", "heldout/"))]
    together |= {key: [key] for key in others}
    panels = []
    for title, keys in together.items():
        lines = {key.partition("/")[2] or key: metrics[key] for key in keys if key in metrics and metrics[key].values}
        if lines:
            panels.append(Panel(title, plots.line_plot(lines, plots.OTHERS[: len(lines)])))
    return panels


def statistics_table(measured: Mapping[str, Mapping[str, Statistic]]) -> dict[str, Any]:
    """Rows by statistic, columns by grid."""
    names = list(dict.fromkeys(name for values in measured.values() for name in values))
    rows = [(name.replace("_", " "), [values.get(name) for values in measured.values()]) for name in names]
    return {"titles": list(measured), "rows": rows}


def diversity_tables(record: RunRecord) -> list[tuple[str, list[Part]]]:
    """Of all samples, and of those that a judge finds right, where the run measured them."""
    titles = {"diversity": "All samples", "diversity_right": "Only samples that are right"}
    return [(title, diversity_parts(record.summary.get(key))) for key, title in titles.items()]


def diversity_parts(entry: Any) -> list[Part]:
    """The whole, then its parts; empty where nothing was measured."""
    if not isinstance(entry, Mapping):
        return []
    changes = {**as_changes({"all pixels": entry}), **as_changes(entry.get("parts"))}
    if all(change.before is None and change.after is None for change in changes.values()):
        return []
    ratios = {name: monitors.ratio(change) for name, change in changes.items()}
    return [
        Part(name, change, ratios[name], (ratios[name] or 1.0) < monitors.NARROWED) for name, change in changes.items()
    ]


def commands(record: RunRecord) -> list[tuple[str, str]]:
    """How the run was started, as far as it was recorded, and how it is repeated."""
    folder = record.folder.resolve()
    place = f"runs/{folder.name}" if folder.parent.name == "runs" else folder.name
    again = f"alignkit run {shlex.quote(place + '/recipe.json')} --out {shlex.quote(place + '-again')}"
    started = record.env.get("command")
    if isinstance(started, list):
        words = [str(word) for word in started]
        started = shlex.join([Path(words[0]).name, *words[1:]]) if words else ""
    first = [("Started with", masked(str(started)))] if started else []
    return [*first, ("Repeat it with", again), ("Make this page again with", f"alignkit report {shlex.quote(place)}")]


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`{"a": {"b": 1}}` as `("a.b", "1")`; lists are written on one line."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", ", ".join(str(item) for item in value)
        else:
            yield f"{prefix}{key}", str(value)


def show_number(value: float | None) -> str:
    """Three significant digits where that reads well; a dash for what was not measured."""
    if value is None:
        return "–"
    size = abs(value)
    if size == 0 or 0.001 <= size < 10:
        return f"{value:.3f}" if size else "0"
    if size < 0.001:
        return f"{value:.2g}"
    return f"{value:,.1f}" if size < 1000 else f"{value:,.0f}"
