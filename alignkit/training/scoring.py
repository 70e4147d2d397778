"""Where and when a run's rewards are computed: at once, or in a thread beside the next rollout; here or elsewhere.

The numbers are the same. One thread scores one batch after the other, in the order they were sampled, and each answer
belongs to its batch, so nothing depends on when it comes. An error comes out where the scores are waited for.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import torch

from alignkit.errors import RecipeError
from alignkit.rewards import Weighted
from alignkit.rewards.embedding import Embedding
from alignkit.rewards.threads import inherited
from alignkit.types import Prompt, Scores

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds that a reward in mid-call is waited for when its round is given up."""


class Worker:
    """One thread that does what it is given, in order. A daemon: a reward that never returns does not hold the exit."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future, Callable[[], object]] | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._stuck = False  # a reward did not come back when it was waited for
        threading.Thread(target=self._work, name="alignkit-rewards", daemon=True).start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Do `job` after those before it, with this thread's gradient mode and autocast."""
        answer: Future[T] = Future()
        self._idle.clear()
        self._jobs.put((answer, inherited(job)))
        return answer

    def drop(self) -> None:
        """Forget what has not begun, and wait a moment for what has."""
        try:
            while True:
                waiting = self._jobs.get_nowait()
                if waiting is not None:
                    waiting[0].cancel()
        except queue.Empty:
            pass
        self._jobs.put((Future(), self._idle.set))
        self._stuck = not self._idle.wait(0.0 if self._stuck else PATIENCE)

    def close(self) -> None:
        """End the thread."""
        self.drop()
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            answer, work = job
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(work())
            except BaseException as error:  # noqa: BLE001 - raised again where the answer is waited for
                answer.set_exception(error)


@dataclass(frozen=True)
class Scored:
    """Scores of one batch, and (B, D) features on the CPU where they were asked for."""

    scores: Scores
    features: torch.Tensor | None = None


class Scoring:
    """How the media of a run are scored.

    Args:
        rewards: what scores them.
        embed: features that are computed along with the scores.
        device: where media are moved to be scored, such as "cuda:1" or "cpu"; None: they stay.
        worker: scores beside the caller; None: at once. The first batch is scored at once in any case, to see that no
            reward draws from torch's global generators.

    Raises:
        RecipeError: with a worker, a reward that is part of the generator, which serves one thread at a time; or a
            device that is not here.
    """

    def __init__(
        self,
        rewards: Weighted,
        embed: Embedding | None = None,
        device: str | None = None,
        worker: Worker | None = None,
    ) -> None:
        if worker is not None and rewards.of_policy:
            raise RecipeError(
                f"rewards_beside=True with {', '.join(sorted(rewards.of_policy))}, which is part of the pipeline that "
                "samples meanwhile; set rewards_beside=False"
            )
        if device is not None:
            _require_device(device)
        self.rewards, self.embed, self.device, self.worker = rewards, embed, device, worker
        self._proven = False

    def gather(self, poll: Callable[[], None], group_size: int = 1) -> Gathering:
        """Score batches as they come; `poll` is asked while they are waited for."""
        return Gathering(self, poll, group_size if self.rewards.groupwise else 1)

    @property
    def sparse(self) -> bool:
        """Whether some frames of videos are enough to score them."""
        return self.embed is None and self.rewards.sparse

    def begin(
        self,
        media: torch.Tensor,
        prompts: Sequence[Prompt],
        latents: torch.Tensor | None,
        num_frames: int | None = None,
    ) -> Future[Scored]:
        """Start to score a batch; media and latents are not changed meanwhile."""

        def job() -> Scored:
            return self._score(media, prompts, latents, num_frames)

        if self.worker is not None and self._proven:
            return self.worker.submit(job)
        self.rewards.watched = self.worker is not None
        done: Future[Scored] = Future()
        done.set_result(job())
        self.rewards.watched, self._proven = False, True
        return done

    def _score(
        self, media: torch.Tensor, prompts: Sequence[Prompt], latents: torch.Tensor | None, num_frames: int | None
    ) -> Scored:
        home = media.device
        if self.device is not None:
            media = media.to(self.device)
            latents = None if latents is None else latents.to(self.device)
        scores = self.rewards(media, prompts, latents, num_frames=num_frames)
        parts = {name: part.to(home) for name, part in scores.parts.items()}
        features = None
        if self.embed is not None:
            with torch.no_grad():
                features = self.embed(media).float().cpu()
        return Scored(Scores(scores.total.to(home), parts, scores.failed), features)


def _require_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"reward_device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error


class Gathering:
    """The batches of one round. Leaving it by an exception drops what was not scored yet."""

    def __init__(self, scoring: Scoring, poll: Callable[[], None], group_size: int) -> None:
        self.scoring, self.poll, self.group_size = scoring, poll, group_size
        self._pending: list[Future[Scored]] = []
        self._media: list[torch.Tensor] = []  # of groups that are not whole yet
        self._latents: list[torch.Tensor] = []
        self._prompts: list[Prompt] = []

    def add(
        self,
        media: torch.Tensor,
        prompts: Sequence[Prompt],
        latents: torch.Tensor | None = None,
        num_frames: int | None = None,
    ) -> None:
        """Score these samples, as soon as their groups are whole where a reward compares a group.

        Args:
            num_frames: the media are the first frames of videos of so many; None: they are whole.
        """
        for earlier in self._pending:
            if earlier.done():
                earlier.result()  # an error surfaces as soon as it can
        self._media.append(media)
        self._latents += [] if latents is None else [latents]
        self._prompts += prompts
        ready = len(self._prompts) // self.group_size * self.group_size
        if not ready:
            return
        whole = torch.cat(self._media) if len(self._media) > 1 else self._media[0]
        below = torch.cat(self._latents) if self._latents else None
        of = None if below is None else below[:ready]
        begun = self.scoring.begin(whole[:ready], self._prompts[:ready], of, num_frames)
        self._pending.append(begun)
        left = ready < len(self._prompts)
        self._media = [whole[ready:]] if left else []
        self._latents = [below[ready:]] if left and below is not None else []
        self._prompts = self._prompts[ready:]

    def scored(self) -> list[Scored]:
        """All batches, in the order they were added."""
        return [self._wait(begun) for begun in self._pending]

    def _wait(self, begun: Future[Scored]) -> Scored:
        while True:
            self.poll()
            try:
                return begun.result(timeout=0.1)
            except NotYet:
                if begun.done():  # the reward's own TimeoutError
                    raise

    def __enter__(self) -> Gathering:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None and self.scoring.worker is not None:
            self.scoring.worker.drop()
