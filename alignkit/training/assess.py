"""Held-out assessment: the same prompts and seeds, with our ODE solver or the pipeline's own scheduler untouched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignkit.data.prompts import batches_of_equal_shape
from alignkit.flow.plan import deterministic
from alignkit.policy import Policy
from alignkit.training.experience import conditions, join_scores, keywords_of
from alignkit.training.scoring import Scoring
from alignkit.training.seeds import generators
from alignkit.types import Prompt, Scores


@dataclass(frozen=True)
class Assessment:
    """Samples of fixed prompts and seeds, and what every reward and judge says of them.

    Attributes:
        prompts: N prompts, in the order of `media`.
        media: (N, 3, H, W) or (N, T, 3, H, W) on the CPU; None where samples differ in shape.
        scores: raw parts of rewards and judges, each (N,).
    """

    prompts: tuple[Prompt, ...]
    media: torch.Tensor | None
    scores: Scores

    def means(self) -> dict[str, float]:
        """Mean of every part over the samples that were scored; a part that applied to none has no mean."""
        means = {name: float(values.double().nanmean()) for name, values in self.scores.parts.items()}
        return {name: mean for name, mean in means.items() if mean == mean}


def assess(
    policy: Policy,
    prompts: Sequence[Prompt],
    judges: Scoring,
    *,
    num_steps: int,
    seed: int,
    call: Mapping[str, Any],
    batch: int,
    poll: Callable[[], None],
    guided: bool = True,
    own_scheduler: bool = False,
) -> Assessment:
    """Sample every prompt once with fixed noise and score it; the weights in force are the policy's current ones."""
    ordered: list[Prompt] = []
    media: list[torch.Tensor] = []
    with judges.gather(poll) as gathering:
        for chunk in batches_of_equal_shape(prompts, batch):
            poll()
            noise = generators(len(chunk), seed, "assess", first=len(ordered))
            latents = None
            if own_scheduler:
                pictures = sample_with_own_scheduler(policy, chunk, num_steps, noise, call)
            else:
                cond = conditions(policy, chunk, num_steps, seed, call, guided)[0]
                latents = policy.rollout(cond, deterministic(num_steps), noise, poll=poll).x0
                with torch.no_grad():
                    pictures = policy.decode(latents, cond)
            poll()
            gathering.add(pictures, chunk, latents)
            ordered.extend(chunk)
            media.append(pictures.cpu())
        scores = [scored.scores for scored in gathering.scored()]
    same = len({m.shape[1:] for m in media}) == 1
    return Assessment(tuple(ordered), torch.cat(media) if same else None, join_scores(scores))


@torch.no_grad()
def sample_with_own_scheduler(
    policy: Policy, prompts: Sequence[Prompt], num_steps: int, rng: list[torch.Generator], call: Mapping[str, Any]
) -> torch.Tensor:
    """Media float32 in [0, 1] from the pipeline as a user would call it, its own scheduler untouched."""
    pipe = policy.pipe
    keywords = {**call, **keywords_of(policy, prompts)}
    if isinstance(keywords.get("negative_prompt"), str):
        keywords["negative_prompt"] = [keywords["negative_prompt"]] * len(prompts)
    bar = vars(pipe).get("_progress_bar_config")
    pipe.set_progress_bar_config(disable=True)
    try:
        result = pipe(
            prompt=[str(p) for p in prompts],
            num_inference_steps=num_steps,
            generator=rng,
            output_type="pt",
            return_dict=False,
            **keywords,
        )[0]
    finally:
        if bar is None:
            vars(pipe).pop("_progress_bar_config", None)
        else:
            pipe._progress_bar_config = bar
    media = torch.stack(list(result)) if isinstance(result, list) else result
    return media.float().clamp(0, 1)
