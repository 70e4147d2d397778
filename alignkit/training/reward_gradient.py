"""The pieces of methods that learn from a reward's gradient: where the sampler goes on from, one step with a graph, and
what judges its end, of which no more frames are decoded than the rewards look at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from alignkit.errors import RecipeError
from alignkit.flow import path as paths
from alignkit.flow.plan import deterministic
from alignkit.flow.transition import ODE, Transition
from alignkit.rewards import Evaluation, Reward, Weighted, load
from alignkit.rewards.base import OfFrames
from alignkit.rewards.of_frames import frames_at
from alignkit.types import Noised, Prompt, Scores

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


def noise_of(path: paths.Path, x0: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(B, ...) the eps with x = alpha x0 + sigma eps, at noise levels sigma (B,) above 0."""
    return (x - paths.expand_to(path.alpha(sigma), x0) * x0) / paths.expand_to(sigma, x0)


# what judges the end


@dataclass(frozen=True, eq=False)
class AtFrames:
    """A reward of some frames of a video, with the frames already chosen.

    Attributes:
        reward: what scores them.
        index: (B, S) of the frames, from 0.
    """

    reward: OfFrames
    index: torch.Tensor
    kind: str = "video"

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def chosen(self, num_frames: int, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B, S) whatever is asked."""
        return self.index

    def of_frames(
        self, frames: torch.Tensor, index: torch.Tensor, num_frames: int, prompts: Sequence[Prompt]
    ) -> Evaluation:
        """As the reward's."""
        return self.reward.of_frames(frames, index, num_frames, prompts)

    def raw(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> Evaluation:
        """Of whole videos (B, T, 3, H, W)."""
        index = self.index.to(media.device)
        return self.of_frames(frames_at(media, index), index, media.shape[1], prompts)

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) for (B, T, 3, H, W)."""
        return self.raw(media, prompts).scores


def scores_of(
    rewards: Weighted,
    policy: Policy,
    x0: torch.Tensor,
    cond: Conditioning,
    seeds: torch.Tensor,
    device: str | None = None,
) -> Scores:
    """Scores of clean latents (B, ...) by the rewards whose weight is not 0; gradients flow to the latents. No more is
    decoded than these rewards look at.

    Args:
        seeds: (B,) int64; which frames a reward draws of a sample's video depends on its seed alone.
        device: where it is scored, such as "cuda:1"; None: where the latents are.
    """
    steering = {name: reward for name, reward in rewards.rewards.items() if rewards.weights[name] != 0}
    prompts, num_frames, first = cond.prompts, None, None
    if any(isinstance(reward, OfFrames) for reward in steering.values()):
        num_frames = policy.num_frames(cond)
        steering = {name: _drawn(reward, num_frames, prompts, seeds) for name, reward in steering.items()}
    own = rewards.of(steering)
    if num_frames is not None:
        first = own.frames_needed(num_frames, prompts)
    if all(reward.kind == "latent" for reward in steering.values()):
        media = x0
    else:
        media = policy.decode(x0, cond) if first is None else policy.decode(x0, cond, frames=first)
    place = x0.device if device is None else torch.device(device)
    return own(media.to(place), prompts, x0.to(place), cond, None if first is None else num_frames)


def without_gradient(x: torch.Tensor, rows: torch.Tensor) -> None:
    """At backward, nothing flows into these rows (B,) of x (B, ...).

    A sample that is left out has the weight 0, and 0 times the infinite slope of a reward that failed on it is NaN.
    The other rows are left as they are: what is not finite there is seen.
    """
    if x.requires_grad and bool(rows.any()):
        x.register_hook(lambda grad: grad.masked_fill(paths.expand_to(rows, grad).bool(), 0.0))


def _drawn(reward: Reward, num_frames: int, prompts: Sequence[Prompt], seeds: torch.Tensor) -> Reward:
    if not isinstance(reward, OfFrames):
        return reward
    # rewards draw frames by a prompt's id: a seed in its place, and every round sees others
    named = [Prompt(str(p), int(seed), p.columns) for p, seed in zip(prompts, seeds, strict=True)]
    return AtFrames(reward, reward.chosen(num_frames, named))


def check_differentiable(rewards: Mapping[Any, float], method: str) -> None:
    """Refuse rewards with a say in the total that give no gradient.

    Raises:
        RecipeError: there is none with a say; or names those without a gradient.
    """
    steering = [load(spec) for spec, weight in rewards.items() if weight != 0]
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
