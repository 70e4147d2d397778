"""Rounds of InstructVideo on clips, by the package's own functions, and what they did to prompts seen and unseen."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch

from alignkit.flow.plan import deterministic
from alignkit.policy import Conditioning, Policy
from alignkit.rewards import Weighted
from alignkit.rewards.video import Segmental
from alignkit.training.experience import Experience
from alignkit.training.gather import Gather
from alignkit.training.instruct_video import InstructVideo
from alignkit.training.learner import Learner
from alignkit.training.runtime import Runtime
from alignkit.training.scoring import Scoring
from alignkit.training.seeds import generator
from alignkit.types import Prompt, Rollouts, Scores
from recipes.clips.policy import ClipPolicy, Spot
from recipes.clips.world import FRAMES, PROMPTS, Clips, frame_scores, lag_one, motion
from recipes.mixture.train import UNUSED

SHAPE: dict[str, Any] = {"prompts_per_step": 16, "group_size": 1, "lr": 2e-3, "num_steps": 10}
EVAL_CLIPS, OTHER_CLIPS = 96, 16

# which frames are judged: segments of 16 frames, and how much less those far from the centre count
REWARDS = {
    "dense": Segmental(Spot(), segments=FRAMES, attenuation=0.0, normalised=False, name="dense"),
    "sparse": Segmental(Spot(), segments=4, attenuation=0.0, normalised=False, name="sparse"),
    "attenuated": Segmental(Spot(), segments=FRAMES, attenuation=1.0, normalised=False, name="attenuated"),
    "both": Segmental(Spot(), segments=4, attenuation=1.0, normalised=False, name="both"),
}


def recipe(reward: str, **fields: Any) -> InstructVideo:
    """InstructVideo on the first prompt."""
    return InstructVideo(**{**UNUSED, **SHAPE, **fields}, rewards={REWARDS[reward]: 1.0})


def train(own: InstructVideo, policy: ClipPolicy, watch: Callable[[int], None]) -> None:
    """All rounds; clean clips come from the world, as from a file, but where the recipe begins from noise.

    Args:
        watch: called after each round with the number of rounds done.
    """
    own.validate()
    trained, runtime, rewards = cast(Policy, policy), Runtime("fp32"), Weighted(own.rewards)
    prompts = [Prompt(PROMPTS[0], id=i) for i in range(own.prompts_per_step)]
    gather = Gather(own, trained, Scoring(rewards), runtime, prompts, None, _go_on)
    learner = Learner(own, trained, runtime, _say_nothing)
    for step in range(own.steps):
        experience = gather.collect(step)[0] if own.whole else drawn(own, policy, prompts, rewards, step)
        weights, live = own.weigh(experience.scores, rewards.weights, experience.groups)
        learner.learn(step, [experience], weights, live, _go_on)
        watch(step + 1)


def drawn(own: InstructVideo, policy: ClipPolicy, prompts: list[Prompt], rewards: Weighted, step: int) -> Experience:
    """Clips of the world as a round's samples."""
    cond = policy.condition(prompts, own.num_steps)
    x0 = policy.clips.sample(prompts, generator(own.seed, "clips", step))
    scores = Scores(torch.zeros(len(x0)), {})  # of clean samples: nothing is learnt from them
    found = Experience(cast(Conditioning, cond), Rollouts(x0, (), cond.sigmas), scores, torch.arange(len(x0)))
    return own.completed(found, rewards)


def sampled(policy: ClipPolicy, prompt: str, num_steps: int, count: int) -> torch.Tensor:
    """(count, 16, 64) clips of one prompt from starting noises that are always the same."""
    cond = policy.condition([Prompt(prompt, id=i) for i in range(count)], num_steps)
    return policy.rollout(cond, deterministic(num_steps), torch.Generator().manual_seed(1234)).x0


@torch.no_grad()
def measured(policy: ClipPolicy, num_steps: int) -> dict[str, float]:
    """What the policy draws of the trained prompt, and how far it moved the samples of the others.

    `forgotten` is the root mean square by which a pixel moved, from the same starting noise: an upper bound of the
    2-Wasserstein distance per pixel.
    """
    base, *others = untrained(policy.clips, num_steps)
    now = sampled(policy, PROMPTS[0], num_steps, EVAL_CLIPS)
    moved = [
        (sampled(policy, prompt, num_steps, OTHER_CLIPS) - before).square().mean()
        for prompt, before in zip(PROMPTS[1:], others, strict=True)
    ]
    scores = frame_scores(now)
    return {
        "reward": float(scores.mean()),
        "centre": float(scores[:, FRAMES // 2].mean()),
        "border": float(scores[:, [0, -1]].mean()),
        "base": float(frame_scores(base).mean()),
        "motion": float(motion(now) / motion(base)),
        "lag_one": float(lag_one(now)),
        "base_lag_one": float(lag_one(base)),
        "spread": float(now.std(dim=0).mean() / base.std(dim=0).mean()),
        "forgotten": float(torch.stack(moved).mean().sqrt()),
    }


@cache
def untrained(clips: Clips, num_steps: int) -> tuple[torch.Tensor, ...]:
    """What the untrained policy draws of each prompt, the trained one first."""
    policy = ClipPolicy(clips)
    counts = (EVAL_CLIPS, *[OTHER_CLIPS] * (len(PROMPTS) - 1))
    return tuple(sampled(policy, prompt, num_steps, n) for prompt, n in zip(PROMPTS, counts, strict=True))


def _go_on() -> None:
    """Nobody asks these runs to stop."""


def _say_nothing(sentence: str) -> None:
    """Nobody listens."""
