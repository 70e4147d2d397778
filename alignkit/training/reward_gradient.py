"""The pieces of methods that learn from a reward's gradient: where the sampler goes on from, one step with a graph, and
what judges its end, of which no frame after the last that the rewards look at is decoded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from alignkit.errors import RecipeError
from alignkit.flow.path import expand_to
from alignkit.flow.plan import deterministic
from alignkit.flow.transition import ODE, Transition
from alignkit.rewards import Weighted, load
from alignkit.rewards.base import NoiseAware, OfFrames
from alignkit.rewards.of_frames import Looking
from alignkit.training.experience import frames_of
from alignkit.types import Noised, Scores

if TYPE_CHECKING:
    from alignkit.policy import Conditioning, Policy

SEEDS = 2**31


# where the sampler goes on from


def steps_left(start: float, num_steps: int) -> int:
    """How many of `num_steps` steps a run has that begins `start` of the way from data to noise: start D, rounded half
    up (the tau D of InstructVideo, 2312.12490)."""
    return math.floor(start * num_steps + 0.5)


def entering_last_step(policy: Policy, latents: torch.Tensor, index: int, cond: Conditioning) -> torch.Tensor:
    """(B, ...) what the last step is entered with, from latents (B, ...) that enter step `index`; no gradient."""
    last = len(cond.timesteps) - 1
    if index == last:
        return latents.detach()
    rng = torch.Generator()  # nothing is drawn
    plan = deterministic(last + 1, start=index)
    ended = policy.rollout(cond, plan, rng, latents=latents, stop=last)
    # weights that autocast has converted without a graph would have none in the step that follows
    torch.clear_autocast_cache()
    return ended.x0


def last_step(policy: Policy, latents: torch.Tensor, cond: Conditioning) -> Transition:
    """The deterministic step to clean latents, its `mean`; one denoiser call, with a graph that ends at `latents`."""
    return policy.transition(latents.detach(), len(cond.timesteps) - 1, cond, ODE)


# what judges the end


def scores_of(
    rewards: Weighted,
    policy: Policy,
    x0: torch.Tensor,
    cond: Conditioning,
    seeds: torch.Tensor,
    device: str | None = None,
) -> Scores:
    """Scores of clean latents (B, ...) by the rewards whose weight is not 0; gradients flow to the latents. Of videos
    whose rewards look at some frames only, the first frames are decoded up to the last of those in the batch.

    Args:
        seeds: (B,) int64; which frames a reward draws of a sample's video depends on its seed alone.
        device: where it is scored, such as "cuda:1"; None: where the latents are.
    """
    steering = {name: reward for name, reward in rewards.rewards.items() if rewards.weights[name] != 0}
    told = {n: Looking(r, seeds=seeds.tolist()) for n, r in steering.items() if isinstance(r, OfFrames)}
    own, prompts = rewards.of(steering | told), cond.prompts
    num_frames = frames_of(policy, cond) if rewards.of(steering).sparse else None
    first = None if num_frames is None else own.frames_needed(num_frames, prompts)
    if all(reward.kind == "latent" for reward in steering.values()):
        media = x0
    else:
        media = policy.decode(x0, cond) if first is None else policy.decode(x0, cond, frames=first)
    place = x0.device if device is None else torch.device(device)
    return own(media.to(place), prompts, x0.to(place), num_frames=None if first is None else num_frames)


def without_gradient(x: torch.Tensor, rows: torch.Tensor) -> None:
    """At backward, nothing flows into these rows (B,) of x (B, ...).

    A sample that is left out has the weight 0, and 0 times the infinite slope of a reward that failed on it is NaN.
    The other rows are left as they are: what is not finite there is seen.
    """
    if x.requires_grad and bool(rows.any()):
        x.register_hook(lambda grad: grad.masked_fill(expand_to(rows, grad).bool(), 0.0))


def check_differentiable(rewards: Mapping[Any, float], method: str) -> None:
    """Refuse rewards with a say in the total that give no gradient, and any that cannot score samples.

    Raises:
        RecipeError: there is none with a say; or names those without a gradient, or those of noisy latents.
    """
    loaded = [(load(spec), weight) for spec, weight in rewards.items()]
    steering = [reward for reward, weight in loaded if weight != 0]
    guides = [reward.name for reward, _ in loaded if isinstance(reward, NoiseAware)]
    if guides:
        raise RecipeError(
            f"{method} scores what it sampled, and {', '.join(guides)} is noise-aware: it guides sampling "
            "(alignkit.guide with method='nrg'); reward with one of media, or a function of (latents, prompts)"
        )
    if not steering:
        raise RecipeError(f"all rewards have weight 0, so {method} has nothing to follow; give one a weight")
    without = [reward.name for reward in steering if not reward.differentiable]
    if without:
        raise RecipeError(
            f"{method} follows the gradient of its rewards and {', '.join(without)} gives none; use GRPO, NFT or RWR, "
            "which take any reward, or a differentiable reward (a function of your own says so by an attribute: "
            "`f.differentiable = True`)"
        )


@dataclass(frozen=True)
class Begun(Noised):
    """Latents with which the sampler enters a step, and what scores where it ends.

    Attributes:
        x0, eps: what the latents were made of, or the end and the beginning of the rollout that they are of.
        index: the step that `latents` enter.
        rewards: of the end.
        seeds: (B,) int64, of the frames that rewards draw.
    """

    index: int = field(kw_only=True)
    rewards: Weighted = field(kw_only=True)
    seeds: torch.Tensor = field(kw_only=True)

    def __getitem__(self, rows: torch.Tensor | list[int] | slice) -> Begun:
        """The same of some of the samples."""
        own = super().__getitem__(rows)
        return Begun(**vars(own), index=self.index, rewards=self.rewards, seeds=self.seeds[rows])
