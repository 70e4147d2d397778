"""Search without gradients, for any reward: around the best noise, along the best paths, or from cheap drafts.

Random search is `best_of_n`: independent noises, the best sample kept. The three here spend the same denoiser calls
where they promise more:

    noise    zero-order search (Ma et al., 2501.09732): neighbours of the best noise so far, round after round
    paths    search over paths (the same paper), pruning (RewardDance, 2509.08826): runs are judged half-way by their
             clean estimate, the best go on, and branch where fresh noise takes copies of them some steps back
    drafts   few-step drafts of many noises, full renders of the winners (Flash-BoN)

Whatever they do, the sampler is deterministic and the calls stay within the budget; `trace["calls_left"]` says how many
a prompt has left, once per batch of prompts.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from alignkit.errors import RecipeError
from alignkit.flow.transition import draw_noise, renoised
from alignkit.inference.method import Calls, Method
from alignkit.inference.runs import Group, Slot, by_slot, judged, rendered, rows_where
from alignkit.inference.task import Found, Task, comparable, pieces_of
from alignkit.policy.conditioning import Conditioning

Over = Literal["noise", "paths", "drafts"]
OPTIONS: dict[str, tuple[str, ...]] = {
    "noise": ("starts", "neighbours", "step"),
    "paths": ("checks", "keep", "branches", "back"),
    "drafts": ("draft_steps", "winners"),
}


@dataclass(frozen=True)
class Search(Method):
    """Search at inference; see the file's first lines for what is searched.

    Attributes:
        over: "noise", "paths" or "drafts"; the attributes of the other two must keep their defaults.
        starts: of noise: how many independent noises are tried first.
        neighbours: of noise: how many one round tries.
        step: of noise: how far they lie, `sqrt(1 - step^2) z + step eps`; 1 is random search.
        checks: of paths: where runs are judged, as shares of the steps.
        keep: of paths: the share of the runs that survives a check.
        branches: of paths: runs that go on from one survivor, itself included; 1 only prunes. There are never more
            runs than at the start.
        back: of paths: the share of the steps by which the copies of a survivor are taken back.
        draft_steps: of drafts: steps of a draft; None: a quarter of the run's, at least 2.
        winners: of drafts: how many are rendered in full.
    """

    name: ClassVar[str] = "search"
    default_budget: ClassVar[float] = 4.0

    over: Over = "noise"
    starts: int = 2
    neighbours: int = 2
    step: float = 0.5
    checks: tuple[float, ...] = (0.3, 0.6)
    keep: float = 0.5
    branches: int = 2
    back: float = 0.2
    draft_steps: int | None = None
    winners: int = 1

    def __post_init__(self) -> None:
        if self.over not in OPTIONS:
            raise RecipeError(f"over={self.over!r} is not known; expected one of {', '.join(get_args(Over))}")
        values = {f.name: (f.default, vars(self)[f.name]) for f in fields(self)}
        for owner, names in OPTIONS.items():
            changed = [n for n in names if values[n][0] != values[n][1]]
            if owner != self.over and changed:
                raise RecipeError(
                    f"{changed[0]}={values[changed[0]][1]} belongs to a search over {owner} and over={self.over!r}; "
                    f"a search over {self.over} has {', '.join(OPTIONS[self.over])}"
                )
        _check_values(self)

    def check(self, task: Task) -> None:
        """Raises RecipeError where the budget is too small for the search that was asked for."""
        super().check(task)
        if self.over == "drafts":
            self.drafts(task.num_steps, task.budget)
        elif self.over == "paths":
            stretches(self, task.num_steps, task.budget)

    def drafts(self, num_steps: int, budget: float) -> tuple[int, int]:
        """(how many drafts, of how many steps): what the full renders of the winners leave of the budget."""
        steps = min(num_steps, max(2, num_steps // 4)) if self.draft_steps is None else self.draft_steps
        if not 1 <= steps <= num_steps:
            raise RecipeError(f"draft_steps={steps} must be one of 1..{num_steps}, the steps of a full render")
        count = (allowance(num_steps, budget) - self.winners * num_steps) // steps
        if count <= self.winners:
            least = self.winners + (self.winners + 1) * steps / num_steps
            raise RecipeError(
                f"budget={budget:g} leaves {max(count, 0)} drafts of {steps} steps for winners={self.winners}; there "
                f"must be more drafts than winners: give a budget of at least {least:.2f}, or fewer draft_steps"
            )
        return count, steps

    def rows(self, budget: float) -> int:
        """Samples of one prompt that gain from being denoised together."""
        return min(max(self.starts, self.neighbours), int(budget)) if self.over == "noise" else int(budget)

    def calls(self, num_steps: int, budget: float) -> Calls:
        """What one prompt costs."""
        if self.over == "noise":
            count = int(budget)
            return Calls(denoiser=count * num_steps, decodes=count, rewards=count)
        if self.over == "drafts":
            count, steps = self.drafts(num_steps, budget)
            spent, judged = count * steps + self.winners * num_steps, count + self.winners
            return Calls(denoiser=spent, decodes=judged, rewards=judged)
        parts = stretches(self, num_steps, budget)
        judged = sum(part.runs for part in parts)
        return Calls(denoiser=sum(part.calls for part in parts), decodes=judged, rewards=judged)

    def draw(self, task: Task, cond: Any, rng: list[torch.Generator]) -> Found:
        """The best of everything that was rendered in full, one of each prompt."""
        if len(cond) > task.batch:
            pieces = pieces_of(len(cond), task.batch)
            return Found.joined([self.draw(task, cond[rows], [rng[i] for i in rows]) for rows in pieces])
        planned = self.calls(task.num_steps, task.budget).denoiser
        task.note("calls_left", allowance(task.num_steps, task.budget) - planned)
        search = {"noise": over_noise, "paths": over_paths, "drafts": over_drafts}[self.over]
        return search(self, task, cond, rng)


def _check_values(search: Search) -> None:
    for name in ("starts", "neighbours", "branches", "winners"):
        if vars(search)[name] < 1:
            raise RecipeError(f"{name}={vars(search)[name]} must be at least 1")
    for name in ("step", "keep", "back"):
        if not 0.0 < vars(search)[name] <= 1.0:
            raise RecipeError(f"{name}={vars(search)[name]} must lie in (0, 1]")
    ascending = list(search.checks) == sorted(set(search.checks))
    if not search.checks or not ascending or not 0.0 < search.checks[0] <= search.checks[-1] < 1.0:
        raise RecipeError(f"checks={search.checks} must be ascending shares of the steps in (0, 1), as (0.3, 0.6) is")


def allowance(num_steps: int, budget: float) -> int:
    """Denoiser calls that one prompt may cost."""
    return math.floor(budget * num_steps + 1e-9)


# over noise


def neighbour(noise: Tensor, eps: Tensor, step: float) -> Tensor:
    """`sqrt(1 - step^2) noise + step eps`, any shape: on the sphere that Gaussian noise fills, as far from `noise` as
    `step` says. Positions that are the same in both are no noise, and stay."""
    return torch.where(eps == noise, noise, math.sqrt(1.0 - step**2) * noise + step * eps)


def require_pure_noise(one: Tensor, other: Tensor, method: str) -> None:
    """Two independent draws of the pipeline's first latents, (P, ...), must have nothing in common.

    Raises:
        RecipeError: they have: the run starts from a picture with noise on it.
    """
    differs = one != other
    a, b = one[differs].double(), other[differs].double()
    found, chance = float((a * b).sum() / (a.norm() * b.norm())), 1.0 / math.sqrt(len(a))
    if abs(found) > 6.0 * chance:
        raise RecipeError(
            f"{method} moves about among pure noises, and two independent first latents of this pipeline correlate by "
            f"{found:.2f} (by chance {chance:.2f}): its runs start from a given picture. Use method='best_of_n' or "
            "'search(over=\"paths\")'"
        )


def over_noise(search: Search, task: Task, cond: Any, rng: Sequence[torch.Generator]) -> Found:
    """1. Render `starts` independent noises. 2. Render neighbours of the best noise so far. 3. Again."""
    count = int(task.budget)
    slots = by_slot(rng, count)
    drawn = torch.stack([task.policy.initial_latents(cond, slot) for slot in slots[: search.starts]])
    pivot, kept = climbed(task, cond, slots[: search.starts], drawn, drawn[0], None)
    for first in range(search.starts, count, search.neighbours):
        chosen = slots[first : first + search.neighbours]
        fresh = torch.stack([task.policy.initial_latents(cond, slot) for slot in chosen])
        if first == search.starts:
            require_pure_noise(drawn[0], fresh[0], "a search over noise")
        tried = neighbour(pivot.expand_as(fresh), fresh, search.step)
        pivot, kept = climbed(task, cond, chosen, tried, pivot, kept)
    return kept


def climbed(
    task: Task, cond: Any, slots: list[Slot], noises: Tensor, pivot: Tensor, kept: Found | None
) -> tuple[Tensor, Found]:
    """The best noise so far and its samples, after rendering `noises` (n, P, ...) too."""
    for noise, found in zip(noises, rendered(task, cond, Group(slots, noises)), strict=True):
        if kept is None:
            kept = found
            continue
        better = comparable(found.scores.total) > comparable(kept.scores.total)
        pivot, kept = rows_where(better, noise, pivot), kept.better(found)
    assert kept is not None
    return pivot, kept


# over paths


@dataclass(frozen=True)
class Stretch:
    """The steps up to one check of a search over paths.

    Attributes:
        begin, end: the steps `begin..end - 1` of the survivors of the check before.
        back: the step at which their copies begin.
        kept: survivors; 0 at the start, where all runs are new.
        runs: survivors and copies.
    """

    begin: int
    end: int
    back: int
    kept: int
    runs: int

    @property
    def calls(self) -> int:
        """Denoiser calls of one prompt."""
        return self.kept * (self.end - self.begin) + (self.runs - self.kept) * (self.end - self.back)


def stretches_from(search: Search, num_steps: int, width: int) -> list[Stretch]:
    """What a search that starts with `width` runs does."""
    inner = {min(max(round(share * num_steps), 1), num_steps) for share in search.checks}
    at = sorted(inner | {num_steps})
    steps_back = max(1, round(search.back * num_steps))
    found = [Stretch(0, at[0], 0, 0, width)]
    for begin, end in itertools.pairwise(at):
        kept = math.ceil(search.keep * found[-1].runs - 1e-9)
        found.append(Stretch(begin, end, max(begin - steps_back, 0), kept, min(kept * search.branches, width)))
    return found


def stretches(search: Search, num_steps: int, budget: float) -> list[Stretch]:
    """The widest search over paths whose calls stay within the budget."""
    allowed = allowance(num_steps, budget)
    width = 1
    while sum(part.calls for part in stretches_from(search, num_steps, width + 1)) <= allowed:
        width += 1
    return stretches_from(search, num_steps, width)


def over_paths(search: Search, task: Task, cond: Any, rng: Sequence[torch.Generator]) -> Found:
    """1. Run to a check. 2. Score the clean estimates; the best runs survive. 3. Copies of them go some steps back by
    fresh noise. 4. Again, and render what is there."""
    parts = stretches(search, task.num_steps, task.budget)
    slots = by_slot(rng, parts[0].runs)
    groups = [Group(slots)]
    for part, following in itertools.pairwise(parts):
        moved = [judged(task, cond, group, part.end) for group in groups]
        latents, totals = (torch.cat(both) for both in zip(*moved, strict=True))
        task.note("runs", {"step": part.end, "runs": part.runs, "kept": following.kept})
        groups = branched(task, cond, slots, top(latents, totals, following.kept), following)
    finished = (found for group in groups for found in rendered(task, cond, group))
    return functools.reduce(Found.better, finished)


def top(latents: Tensor, totals: Tensor, count: int) -> Tensor:
    """(count, P, ...) of latents (n, P, ...): of each prompt those with the largest totals (n, P), best first."""
    order = comparable(totals).argsort(dim=0, descending=True, stable=True)[:count]
    return torch.stack([latents[rows, torch.arange(len(rows))] for rows in order])


def branched(task: Task, cond: Any, slots: list[Slot], survivors: Tensor, part: Stretch) -> list[Group]:
    """The survivors (kept, P, ...) as they are, and copies of them, taken back to the noise of step `part.back`; step 0
    is a new start, from the pipeline's own first latents."""
    own = Group(slots[: part.kept], survivors, part.begin)
    new = slots[part.kept : part.runs]
    if not new:
        return [own]
    if part.back == 0:
        return [own, Group(new)]
    low, high = float(cond.sigmas[part.begin]), float(cond.sigmas[part.back])
    origins = [survivors[i % part.kept] for i in range(len(new))]
    pairs = zip(origins, new, strict=True)
    copies = [renoised(task.policy.path, x, low, high, draw_noise(x, slot)) for x, slot in pairs]
    return [own, Group(new, torch.stack(copies), part.back)]


# over drafts


def over_drafts(search: Search, task: Task, cond: Any, rng: Sequence[torch.Generator]) -> Found:
    """1. Draft many noises in few steps. 2. Render those of the best drafts in full, from the same noise."""
    count, steps = search.drafts(task.num_steps, task.budget)
    slots = by_slot(rng, count)
    same = [[_copy(one) for one in slot] for slot in slots]
    _, totals = judged(task, with_steps(task, cond, steps), Group(slots), steps)
    order = comparable(totals).argsort(dim=0, descending=True, stable=True)[: search.winners]
    task.note("drafts", {"count": count, "steps": steps})
    winners = [[same[slot][prompt] for prompt, slot in enumerate(rows.tolist())] for rows in order]
    return functools.reduce(Found.better, rendered(task, cond, Group(winners)))


def with_steps(task: Task, cond: Any, steps: int) -> Any:
    """The same conditioning on the pipeline's own grid of another length; only its grid is asked for again.

    Raises:
        RecipeError: the pipeline makes another number of steps of it, or noise levels that are not numbers.
    """
    asked = max(1, round(cond.num_steps * steps / len(cond.timesteps)))  # image-to-image runs a share of its steps
    call: dict[str, Any] = {}
    if isinstance(cond, Conditioning):
        call = {**cond[[0]].call(), "seed": cond.seeds[:1]}
        del call["prompt"]
    short = task.policy.condition(cond.prompts[:1], num_steps=asked, **call)
    if len(short.timesteps) != steps or not bool(short.sigmas.isfinite().all()):
        raise RecipeError(
            f"the pipeline's own grid for draft_steps={steps} is {short.sigmas.tolist()}: its noise levels must be "
            f"{steps + 1} numbers; give other draft_steps (some pipelines have no grid of one step)"
        )
    return replace(cond, num_steps=asked, timesteps=short.timesteps, sigmas=short.sigmas)


def _copy(generator: torch.Generator) -> torch.Generator:
    return torch.Generator(generator.device).set_state(generator.get_state())
