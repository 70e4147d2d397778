"""What every method of guidance is, and the simplest one: the best of n samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from alignkit.errors import RecipeError
from alignkit.flow.plan import Plan
from alignkit.inference.judges import Judges
from alignkit.inference.task import Calls, Found, Task, pieces_of, streams
from alignkit.types import Steer


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise RecipeError unless an option is one of those known."""
    if value not in known:
        raise RecipeError(f"{name}={value!r} is not known; expected one of {', '.join(known)}")


@dataclass(frozen=True)
class Method:
    """The options of one method.

    Attributes:
        name: of the method.
        default_budget: denoiser calls over those of one plain sample, where none is given.
    """

    name: ClassVar[str]
    default_budget: ClassVar[float] = 1.0

    def check_rewards(self, judges: Judges) -> None:
        """Refuse rewards that the method cannot use; needs no model.

        Raises:
            RecipeError: names the rewards, and methods that can.
        """

    def check(self, task: Task) -> None:
        """Refuse what cannot work.

        Raises:
            RecipeError: what was given, the rule, and what would work.
        """
        if not 1 <= task.budget < math.inf:
            raise RecipeError(f"budget={task.budget:g}: one plain sample per prompt costs 1; give 1 or more")
        self.check_rewards(task.judges)

    def rows(self, budget: float) -> int:
        """Samples of one prompt that are denoised at the same time."""
        return 1

    def calls(self, num_steps: int, budget: float) -> Calls:
        """What one prompt will cost."""
        raise NotImplementedError

    def draw(self, task: Task, cond: Any, rng: list[torch.Generator]) -> Found:
        """The chosen sample of each of P prompts.

        Args:
            cond: `Conditioning` of P samples.
            rng: P generators; all randomness comes from them, so that a sample does not depend on the others.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class BestOfN(Method):
    """Draw as many plain samples as the budget pays and keep the one with the largest total reward.

    1. Samples are drawn with the deterministic sampler, at most `batch` at once, decoded and scored.
    2. Of each prompt only the best so far is kept.
    """

    name: ClassVar[str] = "best_of_n"
    default_budget: ClassVar[float] = 4.0

    def calls(self, num_steps: int, budget: float) -> Calls:
        return Calls(denoiser=num_steps, decodes=1, rewards=1) * int(budget)

    def draw(self, task: Task, cond: Any, rng: list[torch.Generator]) -> Found:
        return best_of(task, cond, rng, int(task.budget))


def best_of(
    task: Task,
    cond: Any,
    rng: list[torch.Generator],
    count: int,
    plan: Plan | None = None,
    steering: Callable[[Any], Steer] | None = None,
    repeats: Mapping[int, int] | None = None,
) -> Found:
    """The best of `count` samples of each prompt; memory holds `batch` samples and the best so far.

    Args:
        cond: of P samples.
        rng: P generators.
        steering: from the conditioning of the samples that are drawn at once to what steers them; None: nothing.
    """
    own = streams(rng, count)
    best: list[Found | None] = [None] * len(cond)
    # Round by round over the prompts, so that the first sample of every prompt does not depend on `count`.
    wanted = [(prompt, number) for number in range(count) for prompt in range(len(cond))]
    for piece in pieces_of(len(wanted), task.batch):
        prompts = [wanted[i][0] for i in piece]
        generators = [own[prompt * count + number] for prompt, number in (wanted[i] for i in piece)]
        rows = cond[prompts]
        steer = None if steering is None else steering(rows)
        rolled = task.rollout(rows, generators, plan, steer=steer, repeats=repeats)
        found = task.score(rolled.x0, rows)
        for row, prompt in enumerate(prompts):
            one, before = found[[row]], best[prompt]
            best[prompt] = one if before is None else before.better(one)
    return Found.joined([one for one in best if one is not None])
