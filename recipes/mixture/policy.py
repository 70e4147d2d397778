"""The mixture's exact velocity and a small trained correction, with the surface of `alignkit.Policy`.

The correction starts at exactly 0, so the untrained policy is the reference, and the reference is exact. What trains a
`Policy` trains this one through the same functions: conditioning, rollout, transition, companions.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor, nn

from alignkit.errors import PolicyError, RecipeError
from alignkit.flow.path import RectifiedFlow
from alignkit.flow.plan import Plan
from alignkit.flow.transition import Noise, Reduce, Rng, Transition, draw_noise, per_sample_generators, renoised
from alignkit.policy.rolling import steered, with_repeats
from alignkit.types import Prompt, Rollouts, Steer, Step, StepRecord
from recipes.mixture.world import FOUR, Mixture

FREQUENCIES = 8


class Correction(nn.Module):
    """(points (B, D), sigma (B,)) -> (B, D), 0 before training."""

    def __init__(self, dims: int, width: int, depth: int, seed: int) -> None:
        super().__init__()
        sizes = [dims + 2 * FREQUENCIES, *[width] * depth]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            hidden = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())]
            self.hidden, self.last = nn.Sequential(*hidden), nn.Linear(width, dims)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        rates = torch.arange(1, FREQUENCIES + 1, dtype=x.dtype, device=x.device) * math.pi / 2
        angles = rearrange(sigma, "b -> b 1") * rates
        return self.last(self.hidden(torch.cat([x, angles.sin(), angles.cos()], dim=-1)))


@dataclass(frozen=True)
class Points:
    """What a policy of points is conditioned on: nothing but whose group a sample belongs to.

    Attributes:
        prompts: B prompts.
        num_steps: of the grid.
        timesteps: (num_steps,) what the network is told, sigma itself.
        sigmas: (num_steps + 1,) float32, evenly from 1 to 0.
    """

    prompts: tuple[Prompt, ...]
    num_steps: int
    timesteps: Tensor
    sigmas: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, indices: Sequence[int] | Tensor | slice | int) -> Points:
        if isinstance(indices, slice):
            indices = range(len(self))[indices]
        rows = [indices] if isinstance(indices, int) else [int(i) for i in indices]
        return replace(self, prompts=tuple(self.prompts[i] for i in rows))

    def repeat(self, count: int) -> Points:
        """Every sample `count` times, copies side by side."""
        return self[[i for i in range(len(self)) for _ in range(count)]]

    def __add__(self, other: Points) -> Points:
        if self.num_steps != other.num_steps:
            raise RecipeError(f"points on grids of {self.num_steps} and {other.num_steps} steps cannot be joined")
        return replace(self, prompts=self.prompts + other.prompts)

    def to(self, device: torch.device | str) -> Points:
        """Itself: points are small and stay on the CPU."""
        return self

    @property
    def unguided(self) -> Points:
        """Itself: there is no guidance."""
        return self


class Corrections:
    """The trained correction and its companions, by the names that a policy's weights have.

    Attributes:
        active: whose correction is added; None: none, the reference.
    """

    def __init__(self, first: Correction) -> None:
        self.own: dict[str, Correction] = {"trained": first}
        self.active: str | None = "trained"

    def parameters(self) -> list[nn.Parameter]:
        return list(self.own["trained"].parameters())

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        if name != "reference" and name not in self.own:
            raise PolicyError(f'there are no {name!r} weights yet; policy.snapshot("{name}") makes them')
        before, self.active = self.active, None if name == "reference" else name
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and name == "reference"):
                yield
        finally:
            self.active = before

    @torch.no_grad()
    def snapshot(self, name: str, decay: float = 0.0) -> None:
        trained = self.own["trained"]
        if name not in self.own:
            self.own[name] = copy.deepcopy(trained).requires_grad_(False)
        for mine, theirs in zip(self.own[name].parameters(), trained.parameters(), strict=True):
            mine.lerp_(theirs, 1.0 - decay)

    def state(self) -> dict[str, Tensor]:
        return {f"{n}/{k}": v.detach() for n, part in self.own.items() for k, v in part.state_dict().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        for name in {key.split("/")[0] for key in state} - self.own.keys():
            self.snapshot(name)
        for key, tensor in self.state().items():
            tensor.copy_(state[key])


class MixturePolicy:
    """Rectified flow of a `Mixture` with a trained correction.

    Args:
        width, depth: of the correction's hidden layers.
        seed: of its first values; its last layer is 0.
    """

    def __init__(self, mixture: Mixture = FOUR, width: int = 64, depth: int = 3, seed: int = 0) -> None:
        self.mixture = mixture
        self.path, self.prediction = RectifiedFlow(), "velocity"
        self.weights = Corrections(Correction(mixture.dims, width, depth, seed))

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer sees."""
        return self.weights.parameters()

    def reference(self):
        """Context: the exact mixture."""
        return self.weights.using("reference")

    def old(self):
        """Context: the weights of the last `snapshot("old")`."""
        return self.weights.using("old")

    def ema(self):
        """Context: the moving average of the weights."""
        return self.weights.using("ema")

    def snapshot(self, name: str, decay: float = 0.0) -> None:
        """Move the companion to decay * itself + (1 - decay) * the trained weights."""
        self.weights.snapshot(name, decay)

    def close(self) -> None:
        """Nothing to put back."""

    # conditioning

    def condition(self, prompts: Sequence[str], num_steps: int = 10, seed: int | Sequence[int] = 0) -> Points:
        """B prompts on an even grid."""
        named = [p if isinstance(p, Prompt) else Prompt(p, id=i) for i, p in enumerate(prompts)]
        sigmas = torch.linspace(1.0, 0.0, num_steps + 1)
        return Points(tuple(named), num_steps, sigmas[:-1], sigmas)

    def timestep_of(self, sigma: Tensor | float) -> Tensor:
        """The network is told sigma itself."""
        return torch.as_tensor(sigma)

    def sigma_of(self, t: Tensor | float, cond: Points) -> Tensor:
        """The inverse of `timestep_of`."""
        return torch.as_tensor(t)

    # denoising

    def initial_latents(self, cond: Points, rng: Rng) -> Tensor:
        """(B, D) standard normal."""
        return draw_noise(torch.zeros(len(cond), self.mixture.dims), _per_sample(rng, len(cond)))

    def velocity(self, x: Tensor, t: Tensor | float, cond: Points | None = None) -> Tensor:
        """(B, D) dx/dsigma at points (B, D) and timestep `t`, a number or (B,)."""
        sigma = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
        exact = self.mixture.velocity(x, sigma)
        name = self.weights.active
        return exact if name is None else exact + self.weights.own[name](x, sigma)

    model_output = velocity
    prediction_at = velocity

    def transition(
        self,
        x: Tensor,
        index: int,
        cond: Points,
        noise: Noise,
        mask: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Transition:
        """The Gaussian of step `index` of the grid from `x`; the same one that `rollout` samples from."""
        s = cond.sigmas
        v = self.velocity(x, cond.timesteps[index], cond)
        v = v if shift is None else v + shift
        return noise.build(self.path, x, v, float(s[index]), float(s[index + 1]), float(s[1]), mask)

    @torch.no_grad()
    def rollout(
        self,
        cond: Points,
        plan: Plan,
        rng: Rng,
        *,
        latents: Tensor | None = None,
        stop: int | None = None,
        reduce: Reduce = "mean",
        poll: Callable[[], None] | None = None,
        steer: Steer | None = None,
        repeats: Mapping[int, int] | None = None,
        record: bool = True,
    ) -> Rollouts:
        """Sample once per prompt and record the plan's stochastic steps, as `Policy.rollout` does.

        Args:
            latents: (B, D) what step `plan.start` begins with; None: noise.
            stop: the first step that does not run; None: all run.
            steer, repeats, record: see `Policy.rollout`.
        """
        generators = _per_sample(rng, len(cond))
        x = self.initial_latents(cond, generators) if latents is None else latents
        records: list[StepRecord] = []
        left = with_repeats(range(plan.start, plan.num_steps if stop is None else stop), repeats or {})
        while left:
            index = left.pop(0)
            if poll is not None:
                poll()
            v = self.velocity(x, cond.timesteps[index], cond)
            step, shift = steered(self._step(cond, plan, index, x, v), steer)
            transition = step.transition(step.latents, step.velocity)
            x = transition.sample(generators) if step.stochastic else transition.mean
            if step.stochastic and record:
                levels = (step.index, step.timestep, step.sigma, step.sigma_next)
                scored = (transition.mean, transition.log_prob(x, reduce=reduce), None)
                records.append(StepRecord(*levels, step.latents, x, *scored, shift))
            if left and left[0] == index:
                x = renoised(self.path, x, step.sigma_next, step.sigma, draw_noise(x, generators))
        return Rollouts(x, tuple(records), cond.sigmas)

    def _step(self, cond: Points, plan: Plan, index: int, x: Tensor, v: Tensor) -> Step:
        """Step `index` from `x`, as a steering function sees it."""
        s, noise = cond.sigmas, plan.noise_at(index)
        levels = float(s[index]), float(s[index + 1])

        def transition(latents: Tensor, velocity: Tensor) -> Transition:
            return noise.build(self.path, latents, velocity, *levels, float(s[1]))

        return Step(index, float(cond.timesteps[index]), *levels, x, v, index in plan.stochastic, transition)

    def decode(self, x0: Tensor, cond: Points, frames: int | None = None) -> Tensor:
        """Points are their own picture, and have no frames."""
        return x0


def _per_sample(rng: Rng, count: int) -> list[torch.Generator]:
    return rng if isinstance(rng, list) else per_sample_generators(rng, count)
