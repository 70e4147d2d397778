"""Which prompts a step trains on: an endless, seeded sequence of whole prompts that can be saved and "
"resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from alignkit.errors import CheckpointError, RecipeError
from alignkit.types import Prompt


class GroupSampler:
    """`next()` gives the prompts of one step for this rank; every prompt is one group, whole on one rank.

    Every epoch is a new permutation of all prompts, drawn from the seed and the epoch alone, and holds
    floor(N / prompts_per_step) steps; the few prompts left over sit this epoch out, so that no step has a
    prompt twice. All ranks hold the same state and take their own equal slice of a step.

    Args:
        prompts: N prompts with different ids.
        prompts_per_step: over all ranks.

    Raises:
        RecipeError: more prompts per step than there are, or a number that does not split over the ranks.
    """

    def __init__(
        self, prompts: Sequence[Prompt], prompts_per_step: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if not 0 <= rank < world_size:
            raise RecipeError(f"rank={rank} of world_size={world_size}; expected 0 <= rank < world_size")
        if not 1 <= prompts_per_step <= len(prompts):
            raise RecipeError(
                f"prompts_per_step={prompts_per_step} with {len(prompts)} prompts; expected 1 to "
                f"{len(prompts)}, because a step never holds a prompt twice"
            )
        if prompts_per_step % world_size:
            below = prompts_per_step // world_size * world_size
            nearest = " or ".join(str(n) for n in (below, below + world_size) if n)
            raise RecipeError(
                f"prompts_per_step={prompts_per_step} does not split into equal numbers of whole groups over "
                f"{world_size} ranks; nearest: {nearest}"
            )
        if len({prompt.id for prompt in prompts}) != len(prompts):
            raise RecipeError("two prompts have the same id, so that their groups would be merged; number them apart")
        self.prompts = list(prompts)
        self.digest = digest(self.prompts)
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.cursor = 0  # prompts of this epoch that were handed out, over all ranks

    def __iter__(self) -> Iterator[list[Prompt]]:
        return self

    def __next__(self) -> list[Prompt]:
        if self.cursor + self.prompts_per_step > len(self.prompts):
            self.epoch, self.cursor = self.epoch + 1, 0
        order = permutation(len(self.prompts), self.seed, self.epoch)
        share = self.prompts_per_step // self.world_size
        start = self.cursor + self.rank * share
        self.cursor += self.prompts_per_step
        return [self.prompts[index] for index in order[start : start + share]]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: where the sequence stands, and a digest of the prompts it runs over."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "cursor": self.cursor,
            "prompts": self.digest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: the prompts are not the ones of the checkpoint.
        """
        if state["prompts"] != self.digest:
            raise CheckpointError(
                f"the {len(self.prompts)} prompts are not those of the checkpoint: their file was changed in "
                "between. Put the old file back, or start a new run"
            )
        self.seed, self.epoch, self.cursor = int(state["seed"]), int(state["epoch"]), int(state["cursor"])


def permutation(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch; depends on nothing but the arguments."""
    # seed + epoch alone would repeat orders across seeds
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "big") >> 1)
    return torch.randperm(count, generator=generator).tolist()


def digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of ids, texts and columns; of files the name alone, so that a folder may be moved."""
    content = hashlib.sha256()
    for prompt in prompts:
        columns = sorted((name, _portable(value)) for name, value in prompt.columns.items())
        content.update(repr((prompt.id, str(prompt), columns)).encode())
    return content.hexdigest()


def _portable(value: Any) -> str:
    if isinstance(value, list):
        return str([_portable(one) for one in value])
    return value.name if isinstance(value, Path) else str(value)
