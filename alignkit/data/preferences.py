"""Preferences and scored samples on disk: one row for every published format, and what is left out of training.

`load_pairs` and `load_samples` read a file or folder of any format of `preference_formats.FORMATS`. Nothing is used
silently: ties, rows with a side or a label missing, equal pictures and missing files are left out, counted, and said
in one sentence.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.data.comparisons import Comparison, Rated
from alignkit.data.preference_formats import FORMATS, detect, read
from alignkit.data.preference_rows import Numbering, Pair, ScoredSample
from alignkit.data.stored import same_content
from alignkit.errors import DataError, RecipeError
from alignkit.types import Prompt

TIE, UNLABELLED, ONE_SIDED, EQUAL, MISSING = (
    "ties",
    "without a label",
    "with a side missing",
    "with the same picture on both sides",
    "whose file is not there",
)


@dataclass(frozen=True)
class Found:
    """What a file gave.

    Attributes:
        rows: pairs or scored samples, in file order.
        left_out: rows by the reason they are not among them.
        notes: further sentences on how the file was read.
    """

    path: Path
    rows: Sequence[Any]
    left_out: Mapping[str, int]
    notes: tuple[str, ...] = ()

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, each once, in file order; ids are unique."""
        return list({row.prompt.id: row.prompt for row in self.rows}.values())

    def sentence(self) -> str:
        """What was read and what was left out, in one line."""
        kind = "pairs" if self.rows and isinstance(self.rows[0], Pair) else "samples"
        counts = [f"{count} {reason}" for reason, count in self.left_out.items() if count]
        left = f"; left out: {', '.join(counts)}" if counts else "; nothing left out"
        return f"{self.path.name}: {len(self.rows)} {kind} of {len(self.prompts)} prompts{left}" + "".join(
            f". {note}" for note in self.notes
        )


def load_pairs(
    path: str | Path, format: str | None = None, dimension: str | Mapping[str, float] | None = None
) -> Found:
    """The pairs of a file or folder that can be trained on.

    Scored samples become pairs of each prompt's samples with different rewards where a format has only those.

    Args:
        format: a name of `FORMATS`; None: told by the columns.
        dimension: of labels with several (VideoAlign's VQ, MQ, TA): one, or weights of a vote; None: `Overall` where
            the file has it, else an even vote. An even outcome is a tie.

    Raises:
        DataError: nothing usable, with what was found; a damaged row, with its number; a path that leaves the folder.
        RecipeError: an unknown format or dimension.
    """
    path = _existing(path)
    name = _known(path, format)
    left: Counter[str] = Counter()
    rows = list(stream_pairs(path, name, dimension, left))
    return _usable(Found(path, rows, left, FORMATS[name].notes), name, "pairs")


def stream_pairs(
    path: str | Path,
    format: str | None = None,
    dimension: str | Mapping[str, float] | None = None,
    left_out: Counter[str] | None = None,
) -> Iterator[Pair]:
    """The pairs of `load_pairs` one after the other, for tables that should not lie in memory as a whole.

    Rows that were read are forgotten, prompts are not: they keep their ids. Scored samples have to be kept until the
    file ends, because a prompt's pairs are made of all of them.

    Args:
        left_out: counts the rows that are no pairs, by reason, as the reading goes on.
    """
    path = _existing(path)
    return _pairs(read(path, _known(path, format), dimension), Counter() if left_out is None else left_out)


def load_samples(
    path: str | Path, format: str | None = None, dimension: str | Mapping[str, float] | None = None
) -> Found:
    """The scored samples of a file or folder. Both sides of a pair are samples too.

    A pair's sides have the rewards of the file where it has them; else the share of its pairs that a sample wins, 1 or
    0 where it stands in one, which `Found.notes` says; weights of pairs are not used. A sample that stands in several
    rows comes once. Where no row has a reward or label, every sample counts 1, which `Found.notes` says too.

    Args and errors: as of `load_pairs`.
    """
    path, name = _existing(path), format
    name = _known(path, name)
    left: Counter[str] = Counter()
    notes = list(FORMATS[name].notes)
    seen: dict[Any, list[ScoredSample]] = {}
    for one in _samples(read(path, name, dimension), left, notes):
        seen.setdefault((one.prompt.id, one.medium), []).append(one)
    rows = [_merged(same) for same in seen.values()]
    if any(value_of(row) is not None for row in rows):
        left[UNLABELLED] += sum(value_of(row) is None for row in rows)
        rows = [row for row in rows if value_of(row) is not None]
    else:
        rows = [dataclasses.replace(row, reward=1.0) for row in rows]
        notes.append("No rewards and no labels: every sample counts 1")
    return _usable(Found(path, rows, left, tuple(dict.fromkeys(notes))), name, "samples")


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise DataError(f"there is no preference file {path} (looked from {Path.cwd()})")
    return path


def _known(path: Path, name: str | None) -> str:
    if name is None:
        return detect(path)
    if name not in FORMATS:
        raise RecipeError(f"format={name!r}; known: {', '.join(FORMATS)}, or none to tell it by the columns")
    return name


def _usable(found: Found, name: str, what: str) -> Found:
    if not found.rows:
        raise DataError(
            f"no usable {what} in {found.path}, read as {name}: {found.sentence()}. {name} has {FORMATS[name].expected}"
        )
    return found


def _pairs(rows: Iterable[Comparison | Rated], left: Counter[str]) -> Iterator[Pair]:
    number = Numbering()
    rated: dict[int, list[ScoredSample]] = {}
    for row in rows:
        if isinstance(row, Rated):
            sample = _sample(row, number, left)
            if sample is not None:
                rated.setdefault(sample.prompt.id, []).append(sample)
        elif (reason := _fault(row)) is not None:
            left[reason] += 1
        else:
            yield _pair(row, number)
    for samples in rated.values():
        yield from _pairs_of(samples, left)


def _fault(row: Comparison) -> str | None:
    """Why a comparison is no pair; None where it is one."""
    if row.missing:
        return MISSING
    if row.first is None or row.second is None:
        return ONE_SIDED
    if row.verdict is None:
        return UNLABELLED
    if row.verdict == 0:
        return TIE
    return EQUAL if same_content(row.first, row.second) else None


def _pair(row: Comparison, number: Numbering) -> Pair:
    assert row.first is not None and row.second is not None and row.verdict is not None
    media = (row.first, row.second)
    better, worse = (0, 1) if row.verdict > 0 else (1, 0)
    own, others = row.rewards[better], row.rewards[worse]
    margin = row.margin
    if margin is None and "total" in own and "total" in others and own["total"] > others["total"]:
        margin = own["total"] - others["total"]
    return Pair(
        number(row.where, row.prompt, row.key),
        media[better],
        media[worse],
        row.kind,
        margin,
        row.source,
        row.weight,
        own,
        others,
        row.latents[better],
        row.latents[worse],
        row.where,
        row.facts[better],
        row.facts[worse],
    )


def _sample(row: Rated, number: Numbering, left: Counter[str]) -> ScoredSample | None:
    if row.medium is None:
        left[MISSING] += 1
        return None
    prompt = number(row.where, row.prompt, row.key)
    fields = {f.name: getattr(row, f.name) for f in dataclasses.fields(ScoredSample) if f.name != "prompt"}
    return ScoredSample(prompt, **fields)


def _pairs_of(samples: Sequence[ScoredSample], left: Counter[str]) -> Iterator[Pair]:
    """Every two samples of a prompt whose rewards (or labels) differ."""
    for i, one in enumerate(samples):
        for other in samples[i + 1 :]:
            mine, theirs = value_of(one), value_of(other)
            if mine is None or theirs is None:
                left[UNLABELLED] += 1
            elif mine == theirs:
                left[TIE] += 1
            elif same_content(one.medium, other.medium):
                left[EQUAL] += 1
            else:
                yield _ordered(*((one, other) if mine > theirs else (other, one)))


def _ordered(chosen: ScoredSample, rejected: ScoredSample) -> Pair:
    gap = None if chosen.reward is None or rejected.reward is None else chosen.reward - rejected.reward
    return Pair(
        chosen.prompt,
        chosen.medium,
        rejected.medium,
        chosen.kind,
        gap,
        chosen.source,
        1.0,
        chosen.rewards,
        rejected.rewards,
        chosen.latents,
        rejected.latents,
        f"{chosen.where} over {rejected.where}",
    )


def value_of(sample: ScoredSample) -> float | None:
    """The reward, or 1 and 0 for a label; None where neither is known."""
    if sample.reward is not None:
        return sample.reward
    return None if sample.label is None else float(sample.label)


def _merged(same: Sequence[ScoredSample]) -> ScoredSample:
    """One sample that stands in several rows: the mean reward, the label of most rows."""
    rewards = [one.reward for one in same if one.reward is not None]
    labels = [one.label for one in same if one.label is not None]
    share = sum(labels) / len(labels) if labels else 0.5
    label = None if share == 0.5 else share > 0.5
    reward = sum(rewards) / len(rewards) if rewards else None
    return dataclasses.replace(same[0], reward=reward, label=label)


SIDES_ARE_LABELS = "No rewards are recorded: a sample counts the share of its pairs that it wins"


def _samples(rows: Iterable[Comparison | Rated], left: Counter[str], notes: list[str]) -> Iterator[ScoredSample]:
    number = Numbering()
    for row in rows:
        if isinstance(row, Rated):
            sample = _sample(row, number, left)
            if sample is not None:
                yield sample
        elif (reason := _fault(row)) is not None:
            left[reason] += 1
        else:
            pair = _pair(row, number)
            sides = [(pair.chosen, pair.chosen_rewards, pair.chosen_latents, True)]
            sides.append((pair.rejected, pair.rejected_rewards, pair.rejected_latents, False))
            for medium, rewards, latents, label in sides:
                if "total" not in rewards:
                    notes.append(SIDES_ARE_LABELS)
                reward = rewards.get("total", float(label))
                own = {n: v for n, v in rewards.items() if n != "total"}
                rest = (own, label, latents, pair.source, pair.where)
                yield ScoredSample(pair.prompt, medium, pair.kind, reward, *rest)
