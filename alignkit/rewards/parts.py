"""What rewards made of rewards ask of their parts, which may or may not have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from alignkit.rewards.base import Binds, ChecksPrompts, Prepares
from alignkit.rewards.card import HasWeights
from alignkit.rewards.weights import Files
from alignkit.types import Prompt


@runtime_checkable
class Counts(Protocol):
    """A reward that has more numbers for the log than its scores, such as how often its judge gave no verdict."""

    def counted(self) -> Mapping[str, float]:
        """Means over what was scored since the last call."""
        ...


def prepare(reward: Any) -> None:
    """Read the weights of a part, where it has any."""
    if isinstance(reward, Prepares):
        reward.prepare()


def check(reward: Any, prompts: Sequence[Prompt]) -> None:
    """Raises RewardError if a prompt lacks what a part needs of it."""
    if isinstance(reward, ChecksPrompts):
        reward.check_prompts(prompts)


def bound(reward: Any, policy: Any) -> Any:
    """A part with what it needs of the policy, or as it is."""
    return reward.bind(policy) if isinstance(reward, Binds) else reward


def files_of(rewards: Iterable[Any]) -> tuple[Files, ...]:
    """Everything that the parts read."""
    return tuple(files for reward in rewards if isinstance(reward, HasWeights) for files in reward.files())
