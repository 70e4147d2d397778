"""One row for every published format: a pair, or a scored sample, of a prompt that has an id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignkit.data.comparisons import Kind
from alignkit.data.stored import Medium, StoredLatents
from alignkit.errors import DataError
from alignkit.types import Prompt


@dataclass(frozen=True)
class Pair:
    """Two samples of one prompt, one preferred.

    Attributes:
        prompt: its `id` is that of the prompt, not of the row: pairs of one prompt share it.
        chosen, rejected: where the two lie.
        kind: "image" or "video".
        margin: how much better the chosen one is, above 0, in the source's own unit; None where it does not say.
        source: the file or data set it comes from.
        weight: of the row in the loss.
        chosen_rewards, rejected_rewards: scores by name, where the source has them.
        chosen_latents, rejected_latents: clean latents, where they were kept.
        chosen_facts, rejected_facts: what else the source says of either side: a video's fps, num_frames, model.
        where: file and row, for messages.
    """

    prompt: Prompt
    chosen: Medium
    rejected: Medium
    kind: Kind = "image"
    margin: float | None = None
    source: str = ""
    weight: float = 1.0
    chosen_rewards: Mapping[str, float] = field(default_factory=dict)
    rejected_rewards: Mapping[str, float] = field(default_factory=dict)
    chosen_latents: StoredLatents | None = None
    rejected_latents: StoredLatents | None = None
    where: str = ""
    chosen_facts: Mapping[str, Any] = field(default_factory=dict)
    rejected_facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredSample:
    """One sample and what is known of how good it is.

    Attributes:
        prompt: as in `Pair`.
        medium, kind: where it lies, "image" or "video".
        reward: the total; None where only a label is known.
        rewards: scores by name.
        label: whether it is desirable; None where nobody said.
        latents, source, where: as in `Pair`.
    """

    prompt: Prompt
    medium: Medium
    kind: Kind = "image"
    reward: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    label: bool | None = None
    latents: StoredLatents | None = None
    source: str = ""
    where: str = ""


class Numbering:
    """Integer ids of a file's prompts: its own where it has whole numbers, else by first appearance, from 1.

    Without ids in the file, rows are of one prompt where text and columns are equal, as they stand in the file.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Prompt] = {}
        self._kind: type | None = None

    def __call__(self, where: str, prompt: Prompt, key: int | str | None) -> Prompt:
        """The prompt with its id.

        Raises:
            DataError: the id stands for two texts, or only some rows have one.
        """
        if self._kind not in (None, type(key)):
            raise DataError(f"{where}: prompt_id={key!r}; every row of a file has a whole number, or a text, or none")
        self._kind = type(key)
        columns = sorted((name, str(value)) for name, value in prompt.columns.items())
        own = (str(prompt), str(columns)) if key is None else key
        if own not in self._known:
            number = key if isinstance(key, int) else len(self._known) + 1
            self._known[own] = Prompt(str(prompt), id=number, columns=prompt.columns)
        known = self._known[own]
        if str(known) != str(prompt):
            raise DataError(f"{where}: prompt_id={key!r} is {str(prompt)!r} here and {str(known)!r} in an earlier row")
        return known
