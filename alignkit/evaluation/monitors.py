"""Sentences about what a run's record shows: improvement paid for elsewhere, lost diversity, training that stalled.

Each monitor is a function from the record to findings; `FELL`, `NARROWED` and the other thresholds say when one speaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from alignkit.evaluation.record import Change, RunRecord, as_changes, number

FELL = 0.03  # relative fall of a reward or judge that is no longer called noise
DISTANCES = {
    "heldout/kl": "KL of sampled paths from the base, nats",
    "heldout/data_loss": "denoising loss on data",
}
"""Metrics of held-out prompts that say how far a run has gone; more is not better."""
ALARM = 0.1  # rise of the denoising loss on data above which it is reported (DDRL, 2512.04332)
NARROWED = 0.8  # diversity after / before below which a loss is reported
SHIFTED = 2.0  # base standard deviations by which an image statistic may move
OFF_POLICY = 1e-3  # max |ratio - 1| before any update above which sampling and training disagree
STILLED = 0.5  # optical flow after / before below which clips are said to stand still
MOVES = 0.02  # pixels per frame below which the base does not move either
NO_SIGNAL = 0.8  # share of groups without spread above which little is left to learn
NOTHING = Change(None, None)


@dataclass(frozen=True)
class Finding:
    """One sentence for the top of the report; `severe` ones are shown in red."""

    text: str
    severe: bool = True


@dataclass(frozen=True)
class Statistic:
    """A statistic of one grid: mean and standard deviation over its samples."""

    mean: float
    std: float


def fell(change: Change) -> bool:
    """Whether the number fell by more than `FELL` of its size."""
    if change.before is None or change.after is None:
        return False
    return change.before - change.after > FELL * max(abs(change.before), abs(change.after)) + 1e-9


def rose(change: Change) -> bool:
    """Whether the number rose at all."""
    return change.before is not None and change.after is not None and change.after > change.before


def findings(record: RunRecord, statistics: Mapping[str, Mapping[str, Statistic]]) -> list[Finding]:
    """Everything worth saying before the details, the severe findings first.

    Args:
        record: the run.
        statistics: of images and motion, by grid title, the base first, as `report` computes them.
    """
    found = [
        *_hacking(record),
        *_guidance(record),
        *_own_scheduler(record),
        *_diversity(record),
        *_distances(record),
        *_motion(statistics),
        *_statistics(statistics),
        *_training(record),
    ]
    return sorted(found, key=lambda finding: not finding.severe)


def _hacking(record: RunRecord) -> list[Finding]:
    rewards, judges = record.changes("rewards"), record.changes("judges")
    paid = ", ".join(name for name, change in rewards.items() if rose(change))
    found = []
    for name, change in judges.items():
        if fell(change):
            while_rising = f" while the trained reward rose ({paid}): a sign of reward hacking" if paid else ""
            found.append(Finding(f"The judge {name}, never trained on, fell{_span(change)}{while_rising}."))
    for name, change in rewards.items():
        if fell(change):
            found.append(Finding(f"The trained reward {name} fell{_span(change)}."))
    return found


def _guidance(record: RunRecord) -> list[Finding]:
    found = []
    for name, value in guidance_baseline(record).items():
        change = record.changes("rewards").get(name) or record.changes("judges").get(name)
        if change and change.after is not None and rose(change) and value >= change.after:
            text = (
                f"Guidance alone takes the base to {value:.3f} in {name}, no less than training ({change.after:.3f})."
            )
            found.append(Finding(text, severe=False))
    return found


def _own_scheduler(record: RunRecord) -> list[Finding]:
    return [
        Finding(f"With the pipeline's own scheduler {name} fell{_span(change)}.")
        for name, change in record.changes("own_scheduler").items()
        if fell(change)
    ]


def _diversity(record: RunRecord) -> list[Finding]:
    """Diversity also falls when failures vanish; among right samples a fall is a loss."""
    right = _narrowing(record.summary.get("diversity_right"), "Among samples that are right, diversity", True)
    measured = bool(as_changes({"right": record.summary.get("diversity_right")}).get("right", NOTHING).after)
    return [*right, *_narrowing(record.summary.get("diversity"), "Diversity of all samples", not measured)]


def _distances(record: RunRecord) -> list[Finding]:
    changes = record.changes("distances")
    kl, loss = changes.get("kl", NOTHING).after, changes.get("data_loss", NOTHING)
    found = []
    if kl is not None:
        found.append(Finding(f"The aligned sampler is {kl:.1f} nats from the base (KL of sampled paths).", False))
    rise = None if loss.after is None or not loss.before else loss.after / loss.before - 1
    if rise is not None and rise > ALARM:
        found.append(
            Finding(f"The denoising loss on data rose by {rise:.0%}{_span(loss)}: the model is leaving its data.")
        )
    return found


def _narrowing(entry: Any, subject: str, severe: bool) -> list[Finding]:
    if not isinstance(entry, Mapping):
        return []
    whole = ratio(as_changes({"whole": entry})["whole"])
    ratios = {name: ratio(change) for name, change in as_changes(entry.get("parts")).items()}
    narrowed = {name: value for name, value in ratios.items() if value is not None and value < NARROWED}
    if not narrowed and (whole is None or whole >= NARROWED):
        return []
    said = f"is {whole:.0%} of the base's" if whole is not None else "changed"
    parts = ", ".join(f"{name} ({value:.0%})" for name, value in sorted(narrowed.items(), key=lambda item: item[1]))
    which = f"; the parts that fell: {parts}" if parts else f"; no single part fell below {NARROWED:.0%}"
    return [Finding(f"{subject} within groups {said}{which}.", severe and bool(narrowed))]


def _motion(statistics: Mapping[str, Mapping[str, Statistic]]) -> list[Finding]:
    """Still clips are the usual way in which a reward on single frames is hacked (InstructVideo, 2312.12490)."""
    if len(statistics) < 2:
        return []
    (base_title, base), *_, (title, last) = statistics.items()
    before, after = base.get("flow"), last.get("flow")
    if before is None or after is None or before.mean < MOVES or after.mean >= STILLED * before.mean:
        return []
    text = (
        f"Motion fell to {after.mean / before.mean:.0%}: from {before.mean:.3f} pixels per frame of “{base_title}” to "
        f"{after.mean:.3f} of “{title}”. A reward that looks at single frames pays for still clips; add one for "
        "motion, or score fewer frames (Segmental)."
    )
    return [Finding(text)]


def _statistics(statistics: Mapping[str, Mapping[str, Statistic]]) -> list[Finding]:
    if len(statistics) < 2:
        return []
    (base_title, base), *_, (title, last) = statistics.items()
    moved = []
    for name, value in last.items():
        before = base.get(name)
        if before is None:
            continue
        spread = sqrt(before.std**2 + 1e-6)  # a statistic that never varied must move by 0.002 to be named
        if abs(value.mean - before.mean) > SHIFTED * spread:
            moved.append(f"{name.replace('_', ' ')} {before.mean:.3f} to {value.mean:.3f}")
    if not moved:
        return []
    return [Finding(f"Samples of “{title}” left the range of “{base_title}”: {', '.join(moved)}.")]


def _training(record: RunRecord) -> list[Finding]:
    found = []
    first = record.metrics.get("policy/ratio_first_dev")
    if first and first.values and max(first.values) > OFF_POLICY:
        text = (
            f"Before any update max |ratio - 1| reached {max(first.values):.1e}; sampling and training should agree "
            "to 1e-6 there in float32. Usual causes: another precision or attention kernel in one of them."
        )
        found.append(Finding(text))
    idle = record.metrics.get("groups/zero_std_fraction")
    if idle and idle.values and idle.values[-1] >= NO_SIGNAL:
        text = f"At the end {idle.values[-1]:.0%} of the groups had no spread in reward: little is left to learn."
        found.append(Finding(text, severe=False))
    skipped = [f"{key} ({series.skipped})" for key, series in record.metrics.items() if series.skipped]
    if skipped:
        found.append(Finding(f"Values that are not finite were logged: {', '.join(skipped)}."))
    return found


def guidance_baseline(record: RunRecord) -> dict[str, float]:
    """`baselines.guidance` of the summary: what the untrained base reaches with guidance, by reward name."""
    baselines = record.summary.get("baselines")
    guidance = baselines.get("guidance") if isinstance(baselines, Mapping) else None
    if not isinstance(guidance, Mapping):
        return {}
    values = {str(name): number(value) for name, value in guidance.items()}
    return {name: value for name, value in values.items() if value is not None}


def ratio(change: Change) -> float | None:
    """after / before, where both were measured and before is positive."""
    if change.before is None or change.after is None or change.before <= 0:
        return None
    return change.after / change.before


def _span(change: Change) -> str:
    return f" from {change.before:.3f} to {change.after:.3f}"
