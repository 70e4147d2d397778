"""From a round of experience to optimizer steps: whole groups per update, micro-batches per backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from alignkit.errors import AlignkitError
from alignkit.policy import Conditioning
from alignkit.training.experience import Experience
from alignkit.training.runtime import Runtime
from alignkit.types import StepRecord

StepLoss = Callable[[Conditioning, StepRecord, torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(conditioning, recorded step, advantages (B,)) -> loss (B,), numbers (B,) or () for the log."""


@dataclass(frozen=True)
class Piece:
    """Samples of one experience that go through one backward; `live` are those that count."""

    experience: Experience
    rows: list[int]
    advantages: torch.Tensor
    live: torch.Tensor


def minibatches(
    experiences: Sequence[Experience], advantages: torch.Tensor, live: torch.Tensor, updates: int, drop: bool
) -> list[list[Piece]]:
    """Split the round into `updates` shares of whole groups; with `drop`, samples without signal leave."""
    shares: list[list[Piece]] = [[] for _ in range(updates)]
    first = 0
    for experience in experiences:
        count = len(experience.groups)
        group_total = int(experience.groups.max()) + 1
        for update in range(updates):
            low, high = group_total * update // updates, group_total * (update + 1) // updates
            inside = (experience.groups >= low) & (experience.groups < high)
            mask = live[first : first + count].cpu()
            rows = (inside & mask if drop else inside).nonzero()[:, 0].tolist()
            if rows:
                index = [first + r for r in rows]
                shares[update].append(Piece(experience, rows, advantages[index], live[index]))
        first += count
    return shares


def micro_batches(pieces: Sequence[Piece], size: int | None) -> Iterator[Piece]:
    """At most `size` samples at a time."""
    for piece in pieces:
        step = size or len(piece.rows)
        for start in range(0, len(piece.rows), step):
            part = slice(start, start + step)
            yield Piece(piece.experience, piece.rows[part], piece.advantages[part], piece.live[part])


def accumulate(
    runtime: Runtime, pieces: Sequence[Piece], micro_batch: int | None, loss_of: StepLoss, poll: Callable[[], None]
) -> dict[str, list[torch.Tensor]]:
    """Backward through every recorded step of every sample, averaged over the live samples of all processes.

    Returns:
        Numbers for the log by name, one tensor per backward; `replay_...` for samples of earlier rounds.

    Raises:
        AlignkitError: a loss is not finite; says at which step of the sampler and for which prompt.
    """
    total = runtime.sum(float(sum(int(p.live.sum()) for p in pieces)))
    logs: dict[str, list[torch.Tensor]] = {}
    for piece in micro_batches(pieces, micro_batch):
        poll()
        cond = piece.experience.cond[piece.rows]
        for whole in piece.experience.rollouts.steps:
            record = whole[piece.rows]
            with runtime.autocast():
                loss, numbers = loss_of(cond, record, piece.advantages)
            _check_finite(loss, record, cond)
            weighted = torch.where(piece.live.to(loss.device), loss, 0.0).sum()
            runtime.backward(weighted / max(total * len(piece.experience.rollouts.steps), 1.0))
            own = "replay_" if piece.experience.age else ""  # of earlier weights: their ratio is not 1 to begin with
            for name, value in {**numbers, "loss": loss.detach()}.items():
                logs.setdefault(f"{own}{name}", []).append(value.reshape(-1))
    return logs


def _check_finite(loss: torch.Tensor, record: StepRecord, cond: Conditioning) -> None:
    bad = (~loss.detach().isfinite()).nonzero()
    if len(bad):
        prompt = cond.prompts[int(bad[0, 0])]
        raise AlignkitError(
            f"the loss is not finite at sampling step {record.index} (sigma {record.sigma:.3f}) for prompt "
            f"{prompt.id} {str(prompt)[:60]!r}; nothing was updated. Usual causes: weights in fp16, a singular step in "
            "the plan, or latents that overflowed"
        )


def averages(logs: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, float]:
    """Means of logged numbers."""
    return {name: float(torch.cat(list(values)).double().mean()) for name, values in logs.items()}
