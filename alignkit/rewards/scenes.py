"""What a prompt asks of a scene, in GenEval's terms, and whether the objects that were found satisfy it.

GenEval is Ghosh et al., arXiv 2310.11513; the reward made of it is Flow-GRPO's (arXiv 2505.05470).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignkit.errors import RewardError
from alignkit.types import Prompt

RELATIONS = ("left of", "right of", "above", "below")
MARGIN = 0.1  # of both objects' sizes together, by which their centres must differ


@dataclass(frozen=True)
class Wanted:
    """One entry of `include` or `exclude`.

    Attributes:
        label: class of the objects.
        count: how many; as `exclude`, from how many on it is wrong.
        answers: for each property that the objects must have, its value and the values to choose from: a colour among
            the ten, or an `attribute` among those that the entry lists.
        position: relation, and which earlier entry it refers to; None: anywhere.
    """

    label: str
    count: int
    answers: tuple[tuple[str, tuple[str, ...]], ...] = ()
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Request:
    """What a prompt asks for."""

    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...]
    tag: str

    @property
    def labels(self) -> list[str]:
        """All classes that matter, each once."""
        return list(dict.fromkeys(one.label for one in (*self.include, *self.exclude)))


@dataclass(frozen=True)
class Verdict:
    """How an image answers a request.

    Attributes:
        parts: a number in [0, 1] for each thing that was asked.
        correct: all of it is right.
        reasons: what is not.
    """

    parts: tuple[float, ...]
    correct: bool
    reasons: tuple[str, ...]

    @property
    def share(self) -> float:
        """Mean of the parts."""
        return sum(self.parts) / len(self.parts)


def request_of(prompt: Prompt, colours: Sequence[str]) -> Request:
    """The request in a prompt's columns `include`, `exclude` and `tag`, as in GenEval's metadata.

    An entry is `{"class": "cup", "count": 2}`, with `"color": "red"`, `"position": ["left of", 0]` (of the first entry)
    or `"attribute": "wooden", "among": ["wooden", "metal"]` where that is asked; JSON text of a list of these will do.

    Raises:
        RewardError: names the prompt and what is wrong with its entry.
    """
    where = f"prompt {prompt.id} (its line or row in the prompt file) {str(prompt)!r}"
    lists: list[tuple[Wanted, ...]] = []
    for column in ("include", "exclude"):
        entries = prompt.columns.get(column, [])
        try:
            entries = json.loads(entries) if isinstance(entries, str) else entries
        except json.JSONDecodeError as error:
            raise RewardError(f"{where}: column {column!r} is no JSON: {error}") from error
        if not isinstance(entries, (list, tuple)):
            raise RewardError(f"{where}: column {column!r} holds {entries!r}; expected a list of entries")
        lists.append(tuple(_wanted(f"{where}, {column}[{i}]", i, one, colours) for i, one in enumerate(entries)))
    if not lists[0]:
        raise RewardError(
            f'{where} has no column \'include\'; it lists what must be there: [{{"class": "cup", "count": 2}}]'
        )
    return Request(lists[0], lists[1], str(prompt.columns.get("tag", "")))


def _wanted(where: str, index: int, entry: Any, colours: Sequence[str]) -> Wanted:
    known = {"class", "count", "color", "position", "attribute", "among"}
    if not isinstance(entry, Mapping) or "class" not in entry or not set(entry) <= known:
        raise RewardError(f"{where} is {entry!r}; expected an object with 'class' and some of {sorted(known)}")
    count = entry.get("count", 1)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise RewardError(f"{where}: count={count!r}; expected a whole number of at least 1")
    answers: list[tuple[str, tuple[str, ...]]] = []
    if "color" in entry:
        answers.append((str(entry["color"]), tuple(colours)))
    if "attribute" in entry:
        answers.append((str(entry["attribute"]), tuple(map(str, entry.get("among", ())))))
    for answer, among in answers:
        if answer not in among:
            raise RewardError(f"{where}: {answer!r} is not among {', '.join(among) or 'nothing (add `among`)'}")
    position = entry.get("position")
    if position is not None:
        right = isinstance(position, (list, tuple)) and len(position) == 2 and position[0] in RELATIONS
        if not right or position[1] not in range(index):
            raise RewardError(
                f"{where}: position={position!r}; expected one of {', '.join(RELATIONS)} and the place of an earlier "
                "entry, counted from 0"
            )
        position = (str(position[0]), int(position[1]))
    return Wanted(str(entry["class"]), count, tuple(answers), position)


def relations(first: torch.Tensor, second: torch.Tensor) -> frozenset[str]:
    """Where the box `first` lies relative to `second`: none, one or two of `RELATIONS`.

    The centres' offset counts per axis as far as it exceeds 0.1 of both sizes together, and must then be more than half
    of the distance of the centres.

    Args:
        first, second: (4,) left, top, right, bottom in pixels.
    """
    corners = torch.stack([first, second]).double().view(2, 2, 2)
    centres, sizes = corners.mean(dim=1), (corners[:, 1] - corners[:, 0]).abs()
    offset = centres[0] - centres[1]
    beyond = (offset.abs() - MARGIN * sizes.sum(dim=0)).clamp(min=0) * offset.sign()
    if (beyond.abs() < 1e-3).all():
        return frozenset()
    x, y = (beyond / offset.norm()).tolist()
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return frozenset(name for name, holds in held.items() if holds)


def judge(
    request: Request,
    boxes: Mapping[str, torch.Tensor],
    name: Callable[[str, int, tuple[str, ...]], str],
    exact: bool = True,
) -> Verdict:
    """Compare what was found with what was asked.

    For each entry of `include` one part for the number, 1 - |n - k| / k floored at 0, one for each property,
    1 - |k - right| / k, and one for the position, 1 or 0; properties and positions of a wrong number of objects, and
    positions relative to a failed entry, are 0. Each entry of `exclude` is one part, 1 or 0. So the number of parts
    depends on the prompt alone.

    The released reward differs in four ways, of which none is copied: a failed position adds a 0 and then also a 1; its
    number is negative from 2k + 1 objects on; it ignores `exclude`; and where a property fails, the position is left
    out of the mean.

    Args:
        boxes: (n, 4) boxes in pixels of each class that was found, best first.
        name: which of some answers fits the object of a class at a place in that list.
        exact: the reward's rule, exactly k objects. False: the rule of the official evaluation, which looks at the k
            best and forgives more.
    """
    parts: list[float] = []
    reasons: list[str] = []
    matched: list[torch.Tensor | None] = []
    for wanted in request.include:
        found = boxes.get(wanted.label, torch.zeros(0, 4))
        number, k = len(found), wanted.count
        right = number == k if exact else number >= k
        found = found if exact else found[:k]
        parts.append(max(0.0, 1 - abs(number - k) / k))
        wrong = [] if right else [f"{number} {wanted.label}, asked for {'' if exact else 'at least '}{k}"]
        for answer, among in wanted.answers:
            given = [name(wanted.label, place, among) for place in range(k)] if right else []
            parts.append(1 - abs(k - given.count(answer)) / k)
            if right and given.count(answer) < k:
                wrong.append(f"{wanted.label} {', '.join(given)}, asked for {answer}")
        if wanted.position is not None:
            relation, target = wanted.position
            holds = not wrong and _all_lie(found, relation, matched[target])
            parts.append(float(holds))
            if not wrong and not holds:
                wrong.append(f"{wanted.label} not {relation} {request.include[target].label}")
        reasons += wrong
        matched.append(None if wrong else found)
    for unwanted in request.exclude:
        number = len(boxes.get(unwanted.label, ()))
        parts.append(float(number < unwanted.count))
        if number >= unwanted.count:
            reasons.append(f"{number} {unwanted.label}, asked for fewer than {unwanted.count}")
    return Verdict(tuple(parts), not reasons, tuple(reasons))


def _all_lie(found: torch.Tensor, relation: str, targets: torch.Tensor | None) -> bool:
    return targets is not None and all(relation in relations(one, other) for one in found for other in targets)
