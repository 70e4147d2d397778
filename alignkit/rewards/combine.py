"""Rewards made of rewards: a weighted sum with a failure policy."""

from __future__ import annotations

import copy
import logging
import math
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from alignkit.errors import RecipeError
from alignkit.rewards.base import (
    Evaluation,
    NoiseAware,
    OfClean,
    OfFrames,
    Reward,
    RewardFailure,
    ScoresGroups,
    as_prompts,
    evaluate,
)
from alignkit.rewards.deadline import StillRunning, within
from alignkit.rewards.loading import describe, load
from alignkit.rewards.of_frames import Looking, check_prefix, drawn_in, frames_needed, sparse
from alignkit.rewards.parts import Counts, bound, check, prepare
from alignkit.rewards.threads import draws_nothing
from alignkit.types import Prompt, Scores

log = logging.getLogger("alignkit.rewards")

Spec = str | Callable[..., Any]


class Weighted:
    """A weighted sum of rewards that keeps the raw parts. It returns `Scores`.

    A part with weight 0 is computed and reported and has no say in the total. A sample to which a reward
    does not apply (`None` in TRL's style) gets its total from the others; NaN if none applies.

    Args:
        rewards: {spec or callable: weight}, the same as pairs, or one spec or callable with weight 1.
        on_error: "raise" stops with a RewardError that names the reward and the prompt; "mask" makes the
            score and the total of these samples NaN and counts them. A failure is never a score of 0.
            A broken contract (wrong shape, changed media, wrong kind) always stops.
        timeout: seconds that one call of one reward may take; then it counts as failed. See `within`.

    Attributes:
        rewards, weights: by reward name.
        failed: how many samples each reward has failed on so far.
        tracebacks: the last failure of each reward that failed.
        of_policy: names of rewards that are part of the generator they score; known after `bind`.
        watched: refuse rewards that draw from torch's global generators; see `draws_nothing`.
        round: what the random frames of videos are drawn by beside the prompt; None: by the prompt alone.
    """

    def __init__(
        self,
        rewards: Mapping[Any, float] | Sequence[tuple[Any, float]] | Spec,
        on_error: str = "raise",
        timeout: float | None = None,
    ) -> None:
        if on_error not in ("raise", "mask"):
            raise RecipeError(f"on_error={on_error!r}; choose 'raise' (stop) or 'mask' (NaN, counted)")
        pairs = list(rewards.items()) if isinstance(rewards, Mapping) else rewards
        if isinstance(pairs, str) or not isinstance(pairs, Sequence):
            pairs = [(pairs, 1.0)]
        if not pairs:
            raise RecipeError("no rewards given; expected at least one, e.g. {'ocr': 1.0}")
        self.on_error = on_error
        self.timeout = timeout
        self.rewards: dict[str, Reward] = {}
        self.weights: dict[str, float] = {}
        for spec, weight in pairs:
            self._add(load(spec), weight)
        self.failed: dict[str, int] = dict.fromkeys(self.rewards, 0)
        self.tracebacks: dict[str, str] = {}
        self.of_policy: frozenset[str] = frozenset()
        self.watched = False
        self.round: Sequence[int | str] | None = None
        self._left_running: dict[str, threading.Thread] = {}

    def _add(self, reward: Reward, weight: float) -> None:
        if reward.name in self.rewards:
            raise RecipeError(f"two rewards are called {reward.name!r}; give one of them another `name`")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise RecipeError(f"the weight of reward {reward.name!r} is {weight!r}; expected a finite number")
        self.rewards[reward.name] = reward
        self.weights[reward.name] = float(weight)

    def and_judges(self, judges: Iterable[Spec]) -> Weighted:
        """For assessing: these rewards, loaded once, and `judges` with weight 0.

        Rewards that compare the samples of a group are left out: an assessment has one sample per prompt.

        Raises:
            RecipeError: nothing is left.
        """
        alone = [(r, self.weights[n]) for n, r in self.rewards.items() if not isinstance(r, ScoresGroups)]
        both = [*alone, *((judge, 0.0) for judge in judges)]
        if not both:
            raise RecipeError(
                f"{', '.join(self.rewards)} compares samples of one prompt with each other, so its mean cannot rise; "
                "add a reward that scores single samples to `judges`, to see whether they get better"
            )
        found = Weighted(both, self.on_error, self.timeout)
        found.of_policy = self.of_policy & set(found.rewards)
        return found

    def of(self, rewards: Mapping[str, Reward]) -> Weighted:
        """Some of these rewards, or others in their place, under their names and weights. What fails there is noted
        here too."""
        own = copy.copy(self)
        own.rewards = dict(rewards)
        own.weights = {name: self.weights[name] for name in rewards}
        return own

    def bind(self, policy: Any) -> None:
        """Hand the policy to the rewards that are part of the generator; see `Binds`."""
        for name in set(self.rewards) - self.of_policy:
            own = bound(self.rewards[name], policy)
            if own is not self.rewards[name]:
                self.rewards[name], self.of_policy = own, self.of_policy | {name}

    def prepare(self) -> None:
        """Read all weights now, so that what is missing is said before anything is spent."""
        for reward in self.rewards.values():
            prepare(reward)

    @property
    def groupwise(self) -> bool:
        """Whether a part compares samples of one prompt, so that a batch must hold whole groups."""
        return any(isinstance(reward, ScoresGroups) for reward in self.rewards.values())

    def counted(self) -> dict[str, float]:
        """`name/number` of the parts that count something beside their scores, since the last call."""
        own = {name: reward.counted() for name, reward in self.rewards.items() if isinstance(reward, Counts)}
        return {f"{name}/{number}": value for name, numbers in own.items() for number, value in numbers.items()}

    @property
    def differentiable(self) -> bool:
        """Whether every part that has a say in the total gives gradients."""
        return all(reward.differentiable for name, reward in self.rewards.items() if self.weights[name] != 0)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises RewardError before any image is made if a prompt lacks what a reward needs of it."""
        for reward in self.rewards.values():
            check(reward, as_prompts(prompts))

    def describe(self) -> dict[str, Any]:
        """A JSON record of the parts, their weights and the failure policy."""
        parts = [{**describe(reward), "weight": self.weights[name]} for name, reward in self.rewards.items()]
        return {"on_error": self.on_error, "timeout": self.timeout, "rewards": parts}

    @property
    def sparse(self) -> bool:
        """Whether the parts look at some frames of videos only, so that the others need not be decoded."""
        return sparse(self.rewards)

    def frames_needed(self, num_frames: int, prompts: Sequence[str]) -> int | None:
        """How many leading frames of videos of `num_frames` the rewards look at in this batch; None: all of them."""
        known = as_prompts(prompts)
        return frames_needed(self._looking(known), num_frames, known) if self.sparse else None

    def _looking(self, prompts: Sequence[Prompt], num_frames: int | None = None) -> dict[str, Reward]:
        """The rewards by name, those of some frames told the round and of how many frames the videos are."""
        if self.round is None and num_frames is None:
            return self.rewards
        seeds = None if self.round is None else drawn_in(self.round, prompts)
        told = {n: Looking(r, num_frames, seeds) for n, r in self.rewards.items() if isinstance(r, OfFrames)}
        return self.rewards | told

    def __call__(
        self,
        media: torch.Tensor,
        prompts: Sequence[str],
        latents: torch.Tensor | None = None,
        cond: Any = None,
        num_frames: int | None = None,
    ) -> Scores:
        """Scores of one batch.

        Args:
            media: (B, 3, H, W) or (B, T, 3, H, W), float in [0, 1].
            prompts: B prompts.
            latents: (B, ...) what the media were decoded from, for rewards of kind "latent". Without them, such as
                after the pipeline's own scheduler, those rewards do not apply.
            cond: the `Conditioning` of the B samples, for noise-aware rewards, which score the latents as clean.
            num_frames: `media` are the first frames of videos of so many, at least `frames_needed(...)` of them, and
                the scores are those of the whole videos; None: `media` are whole.

        Raises:
            RewardError: see `on_error`.
            RecipeError: a noise-aware reward without `cond`; a reward that looks at whole videos, or at frames that
                are not there.
        """
        known = as_prompts(prompts)
        looking = self._looking(known, num_frames)
        if num_frames is not None:
            check_prefix(self.rewards, media, self.frames_needed(num_frames, known) or num_frames, num_frames)
        before = dict(self.failed)
        parts: dict[str, Evaluation] = {}
        for name, reward in looking.items():
            seen = latents if reward.kind == "latent" else media
            if seen is None:
                parts[name] = not_applicable(len(known), media.device)
                continue
            asked = _of_clean(reward, cond) if isinstance(reward, NoiseAware) else reward
            parts[name] = self._evaluate(asked, seen, known)
        return Scores(
            total=weighted_total(parts, self.weights),
            parts={name: part.scores for name, part in parts.items()},
            failed={name: count - before[name] for name, count in self.failed.items()},
        )

    def _evaluate(self, reward: Reward, media: torch.Tensor, prompts: list[Prompt]) -> Evaluation:
        try:
            evaluation = self._within_deadline(reward, media, prompts)
        except RewardFailure as failure:
            if self.on_error == "raise":
                raise
            nothing = torch.full((len(prompts),), math.nan, device=media.device)
            evaluation = Evaluation(nothing, torch.ones_like(nothing, dtype=torch.bool))
            self._record(reward.name, "".join(traceback.format_exception(failure)))
        failed = evaluation.failed
        if not failed.any():
            return evaluation
        index = int(failed.nonzero()[0, 0])
        prompt = prompts[index]
        found = f"{evaluation.scores[index].item()} for sample {index}, prompt {prompt.id} {str(prompt)!r}"
        if self.on_error == "raise":
            raise RewardFailure(
                f"reward {reward.name!r} returned {found}; expected a finite number. Repair the reward, or "
                "choose on_error='mask' to leave such samples out"
            )
        self.failed[reward.name] += int(failed.sum())
        if reward.name not in self.tracebacks:
            self._record(reward.name, f"returned {found}")
        return Evaluation(evaluation.scores.masked_fill(failed, math.nan), evaluation.applicable)

    def _within_deadline(self, reward: Reward, media: torch.Tensor, prompts: list[Prompt]) -> Evaluation:
        shown = f"reward {reward.name!r}, prompts {', '.join(str(prompt.id) for prompt in prompts[:8])}"
        busy = self._left_running.get(reward.name)
        if busy is not None and busy.is_alive():
            raise RewardFailure(f"{shown}: it is still in the call that ran out of time before")
        watch = draws_nothing(reward.name, media.device) if self.watched else nullcontext()
        try:
            with watch:
                return within(self.timeout, lambda: evaluate(reward, media, prompts))
        except TimeoutError as error:
            if isinstance(error, StillRunning):
                self._left_running[reward.name] = error.thread
            raise RewardFailure(f"{shown}: {error}") from error

    def _record(self, name: str, reason: str) -> None:
        if name not in self.tracebacks:
            log.warning("reward %r failed; its samples are left out (said once per reward):\n%s", name, reason)
        self.tracebacks[name] = reason


def _of_clean(reward: NoiseAware, cond: Any) -> Reward:
    if cond is None:
        raise RecipeError(
            f"reward {reward.name!r} is noise-aware: it guides sampling (alignkit.guide with method='nrg', or `guide` "
            "of Euphonium and ValueGradient) and cannot score rollouts of a recipe; reward those with one of media"
        )
    return OfClean(reward, cond)


def not_applicable(batch: int, device: torch.device) -> Evaluation:
    """What a reward says of `batch` samples that it cannot be asked about."""
    return Evaluation(
        torch.full((batch,), math.nan, device=device), torch.zeros(batch, dtype=torch.bool, device=device)
    )


def weighted_total(parts: Mapping[str, Evaluation], weights: Mapping[str, float]) -> torch.Tensor:
    """(B,) sum of weight * score over the parts that apply; NaN where one of them failed or none applies."""
    counted = [name for name in parts if weights[name] != 0]
    # Only weights of 0: nothing is optimised, so the total is 0 and not NaN.
    total = torch.zeros_like(next(iter(parts.values())).scores)
    if not counted:
        return total
    for name in counted:
        part = parts[name]
        total = total + torch.where(part.applicable, weights[name] * part.scores, 0.0)
    applies = torch.stack([parts[name].applicable for name in counted]).any(dim=0)
    return total.masked_fill(~applies, math.nan)


def in_micro_batches(
    rewards: Weighted, media: torch.Tensor, prompts: Sequence[str], micro_batch: int | None = None
) -> Scores:
    """The scores of a large batch, computed `micro_batch` samples at a time (None: all at once)."""
    known = as_prompts(prompts)
    if micro_batch is not None and micro_batch < 1:
        raise RecipeError(f"micro_batch={micro_batch}; expected at least 1, or None for all at once")
    size = micro_batch or max(len(known), 1)
    if len(known) <= size:
        return rewards(media, known)
    done = [rewards(part, known[i * size : (i + 1) * size]) for i, part in enumerate(media.split(size))]
    return Scores(
        total=torch.cat([scores.total for scores in done]),
        parts={name: torch.cat([scores.parts[name] for scores in done]) for name in rewards.rewards},
        failed={name: sum(scores.failed[name] for scores in done) for name in rewards.rewards},
    )
