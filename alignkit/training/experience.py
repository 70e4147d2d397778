"""One round of experience: groups of samples, their rewards, their advantages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from alignkit.data.media import load_images
from alignkit.data.prompts import batches_of_equal_shape
from alignkit.errors import RecipeError
from alignkit.policy import Conditioning, Policy
from alignkit.training.scoring import Scoring
from alignkit.training.seeds import generators
from alignkit.types import Prompt, Rollouts, Scores, StepRecord, View


class Rollout(Protocol):
    """How samples are drawn; `Recipe.rollout` with all but two arguments given."""

    def __call__(self, cond: Conditioning, *, rng: list[torch.Generator]) -> Rollouts: ...


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
        losers: (B, ...) final latents of the rejected side, where a sample is a pair; `rollouts.x0` then is the
            preferred side.
        media: (B, 3, H, W) or (B, T, 3, H, W) in [0, 1], where the recipe still needs them after they were scored.
        maps: (B, h, w) how right each region is, where the recipe learns from regions.
        process: (B, V) what a guide says of each recorded step, where the recipe learns from it.
        gate: (B,) how much each sample's anchor counts; None: 1.
        empty: the same samples without their captions, where the recipe drops some.
        views: what is trained on, each of B samples.
    """

    cond: Conditioning
    rollouts: Rollouts
    scores: Scores
    groups: torch.Tensor
    features: torch.Tensor | None = None
    age: int = 0
    losers: torch.Tensor | None = None
    media: torch.Tensor | None = None
    maps: torch.Tensor | None = None
    process: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    empty: Conditioning | None = None
    views: tuple[View, ...] = ()

    def conditioning(self, view: View, rows: list[int]) -> Conditioning:
        """Of these samples, without the captions that the view drops."""
        dropped = None if isinstance(view, StepRecord) else view.dropped
        if dropped is None:
            return self.cond[rows]
        if self.empty is None:
            raise RecipeError("a view drops captions and the experience was made without `empty`")
        return (self.cond + self.empty)[[row + len(self.cond) * bool(dropped[row]) for row in rows]]

    def with_rows(self, rows: list[int]) -> Experience:
        """Some of the samples, in this order, each its own group; views are left behind."""
        kept = {n: getattr(self, n) for n in ("features", "losers", "media", "maps", "process", "gate")}
        steps = tuple(record[rows] for record in self.rollouts.steps)
        return replace(
            self,
            cond=self.cond[rows],
            rollouts=replace(self.rollouts, x0=self.rollouts.x0[rows], steps=steps),
            scores=rows_of(self.scores, rows),
            groups=torch.arange(len(rows)),
            empty=None if self.empty is None else self.empty[rows],
            views=(),
            **{n: None if value is None else value[rows] for n, value in kept.items()},
        )


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
    rollout: Rollout,
    scoring: Scoring,
    *,
    group_size: int,
    batch: int | None,
    key: tuple[int | str, ...],
    first: int,
    poll: Callable[[], None],
    keep_media: bool = False,
) -> Experience:
    """Sample `group_size` times per prompt, decode, score. Of videos whose rewards look at some frames only, no more
    than the first frames up to the last of those in the batch are decoded; random ones are drawn by `key` and prompt.

    Args:
        cond: one sample per prompt.
        rollout: samples these, with one generator each.
        batch: samples per rollout; None: all.
        key, first: seeds of the samples, and the global index of this process's first one.
        keep_media: the experience keeps what was scored.
    """
    whole = cond.repeat(group_size)
    size = batch or len(whole)
    parts: list[Rollouts] = []
    kept: list[torch.Tensor] = []
    scoring.rewards.round = key
    num_frames = frames_of(policy, cond) if scoring.sparse and not keep_media else None
    with scoring.gather(poll, group_size) as gathering:
        for start in range(0, len(whole), size):
            piece = whole[start : start + size]
            rolled = rollout(piece, rng=generators(len(piece), *key, first=first + start))
            frames = None if num_frames is None else scoring.rewards.frames_needed(num_frames, piece.prompts)
            with torch.no_grad():
                media = policy.decode(rolled.x0, piece, frames)
            poll()
            parts.append(rolled)
            kept += [media] if keep_media else []
            gathering.add(media, piece.prompts, rolled.x0, None if frames is None else num_frames)
            poll()
        scored = gathering.scored()
    groups = torch.arange(len(cond)).repeat_interleave(group_size)
    features = None if scored[0].features is None else torch.cat([s.features for s in scored if s.features is not None])
    scores = join_scores([s.scores for s in scored])
    return Experience(
        whole, join_rollouts(parts), scores, groups, features, media=torch.cat(kept) if keep_media else None
    )


def frames_of(policy: Policy, cond: Conditioning) -> int | None:
    """Frames of a video that is decoded whole; None where there are no first frames to decode alone, as of pictures."""
    try:
        return policy.num_frames(cond)
    except RecipeError:
        return None


def join_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """Batches of one plan as one batch."""
    if len(parts) == 1:
        return parts[0]
    steps: list[StepRecord] = []
    for records in zip(*(part.steps for part in parts), strict=True):
        first = records[0]
        tensors: dict[str, Any] = {
            n: torch.cat([getattr(r, n) for r in records]) for n in ("latents", "next_latents", "mean", "log_prob")
        }
        for name in ("mask", "shift"):
            own = [value for r in records if (value := getattr(r, name)) is not None]
            tensors[name] = torch.cat(own) if own else None
        steps.append(StepRecord(first.index, first.timestep, first.sigma, first.sigma_next, **tensors))
    return Rollouts(torch.cat([part.x0 for part in parts]), tuple(steps), parts[0].sigmas)


def rows_of(scores: Scores, rows: list[int]) -> Scores:
    """Scores of some of the samples."""
    return replace(scores, total=scores.total[rows], parts={n: part[rows] for n, part in scores.parts.items()})


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Scores of several batches as one."""
    return Scores(
        total=torch.cat([s.total for s in parts]),
        parts={name: torch.cat([s.parts[name] for s in parts]) for name in parts[0].parts},
        failed={name: sum(s.failed[name] for s in parts) for name in parts[0].failed},
    )
