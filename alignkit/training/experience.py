"""One round of experience: groups of samples, their rewards, their advantages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignkit.data.media import load_images
from alignkit.data.prompts import batches_of_equal_shape
from alignkit.flow.plan import Plan
from alignkit.flow.transition import Reduce
from alignkit.policy import Conditioning, Policy
from alignkit.training.scoring import Scoring
from alignkit.training.seeds import generators
from alignkit.types import Prompt, Rollouts, Scores, StepRecord


@dataclass(frozen=True)
class Experience:
    """B = prompts x group_size samples of this process, group by group.

    Attributes:
        cond: of all B samples.
        rollouts: endpoints and recorded stochastic steps of all B.
        scores: rewards of all B.
        groups: (B,) int64; samples of one prompt of the round share a number.
        features: (B, D) on the CPU, where the recipe compares the samples of a group; else None.
        age: rounds since these were sampled; 0 = by the weights of this round.
    """

    cond: Conditioning
    rollouts: Rollouts
    scores: Scores
    groups: torch.Tensor
    features: torch.Tensor | None = None
    age: int = 0


def keywords_of(policy: Policy, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Columns of the prompt file that the pipeline takes as keywords: pictures are read, shapes hold for the batch."""
    found: dict[str, Any] = {}
    for column in prompts[0].columns:
        keyword = "mask_image" if column == "mask" else column
        if keyword not in policy.driver.keywords:
            continue
        if column in ("image", "mask"):
            found[keyword] = [load_images(p, column)[0] for p in prompts]
        elif column in ("height", "width", "num_frames"):
            found[keyword] = prompts[0].columns[column]
        elif column == "negative_prompt":
            found[keyword] = [str(p.columns.get(column, "")) for p in prompts]
    return found


def conditions(
    policy: Policy, prompts: Sequence[Prompt], num_steps: int, seed: int, call: Mapping[str, Any], guided: bool
) -> list[Conditioning]:
    """Encode prompts with the recipe's keywords, one conditioning per shape."""
    made: list[Conditioning] = []
    for batch in batches_of_equal_shape(prompts, len(prompts)):
        keywords = {**call, **keywords_of(policy, batch)}
        cond = policy.condition(batch, num_steps=num_steps, seed=seed, **keywords)
        made.append(cond if guided else cond.unguided)
    return made


def collect(
    policy: Policy,
    cond: Conditioning,
    plan: Plan,
    scoring: Scoring,
    *,
    group_size: int,
    batch: int | None,
    key: tuple[int | str, ...],
    first: int,
    reduce: Reduce,
    poll: Callable[[], None],
) -> Experience:
    """Sample `group_size` times per prompt, decode, score.

    Args:
        cond: one sample per prompt.
        batch: samples per rollout; None: all.
        key, first: seeds of the samples, and the global index of this process's first one.
    """
    whole = cond.repeat(group_size)
    size = batch or len(whole)
    parts: list[Rollouts] = []
    with scoring.gather(poll, group_size) as gathering:
        for start in range(0, len(whole), size):
            piece = whole[start : start + size]
            rolled = policy.rollout(
                piece, plan, generators(len(piece), *key, first=first + start), reduce=reduce, poll=poll
            )
            with torch.no_grad():
                media = policy.decode(rolled.x0, piece)
            poll()
            parts.append(rolled)
            gathering.add(media, piece.prompts, rolled.x0)
            poll()
        scored = gathering.scored()
    groups = torch.arange(len(cond)).repeat_interleave(group_size)
    features = None if scored[0].features is None else torch.cat([s.features for s in scored if s.features is not None])
    return Experience(whole, join_rollouts(parts), join_scores([s.scores for s in scored]), groups, features)


def join_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """Batches of one plan as one batch."""
    if len(parts) == 1:
        return parts[0]
    steps: list[StepRecord] = []
    for records in zip(*(part.steps for part in parts), strict=True):
        first = records[0]
        tensors = {
            n: torch.cat([getattr(r, n) for r in records]) for n in ("latents", "next_latents", "mean", "log_prob")
        }
        mask = None if first.mask is None else torch.cat([r.mask for r in records if r.mask is not None])
        steps.append(StepRecord(first.index, first.timestep, first.sigma, first.sigma_next, mask=mask, **tensors))
    return Rollouts(torch.cat([part.x0 for part in parts]), tuple(steps), parts[0].sigmas)


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Scores of several batches as one."""
    return Scores(
        total=torch.cat([s.total for s in parts]),
        parts={name: torch.cat([s.parts[name] for s in parts]) for name in parts[0].parts},
        failed={name: sum(s.failed[name] for s in parts) for name in parts[0].failed},
    )
