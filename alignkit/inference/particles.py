"""Particle steering: the samples of a prompt are drawn together, weighted by what their clean estimates are worth, and
copied or dropped on the way. Any reward, and exact in the limit: weighted, they are samples of p exp(strength r).

    FK    Feynman-Kac steering (2501.06848): at a few moments; rewards need no gradient
    DAS   tempered sequential Monte Carlo (2501.05803): at every step, proposals follow the gradient of the reward

Weights and resampling are in `flow.particles`, runs in `cloud`. Copies part again through the sampler's noise only, so
the sampler is stochastic.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from alignkit.errors import RecipeError
from alignkit.flow.particles import POTENTIALS, RESAMPLINGS, Potential, Resampling, tempering_rate
from alignkit.flow.path import Path, VariancePreserving
from alignkit.flow.plan import Plan, full
from alignkit.flow.transition import Noise
from alignkit.inference.cloud import Cloud, DASRun, FKRun, Pick, Run, chosen
from alignkit.inference.judges import Judges
from alignkit.inference.method import Calls, Method, one_of
from alignkit.inference.saving import recomputing
from alignkit.inference.steering import Through
from alignkit.inference.task import Found, Task, streams


@dataclass(frozen=True)
class Particles(Method):
    """What both methods can be told.

    Attributes:
        strength: lambda of the distribution p exp(lambda r) that is drawn from; it belongs to the reward's scale. A
            difference of 1 / lambda in reward makes a particle e times as likely.
        noise: of the sampler; a number is the level of flow_sde on rectified flow and of ddim on variance-preserving
            models. None: their published levels, 0.7 and 1.
        resampling: "systematic", "multinomial" or "ssp"; see `flow.particles`.
        ess: particles are resampled where their effective number is below this share; 1: whenever weights differ.
            Weights that are not resampled are carried.
        pick: "best", the particle with the largest reward, or "sample", one drawn by the last weights: a sample of
            p exp(lambda r) in the limit of many particles.
    """

    default_budget: ClassVar[float] = 4.0

    strength: float = 10.0
    noise: Noise | float | None = None
    resampling: Resampling = "systematic"
    ess: float = 0.5
    pick: Pick = "best"

    def __post_init__(self) -> None:
        for name, known in (("resampling", tuple(RESAMPLINGS)), ("pick", get_args(Pick))):
            one_of(name, vars(self)[name], known)
        if not isinstance(self.noise, Noise | float | int | None):
            raise RecipeError(f"noise={self.noise!r}; expected a Noise, its level as a number, or None")
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise RecipeError(
                f"strength={self.strength} must be a number of at least 0; to lower a reward, give it a negative weight"
            )
        if not 0 <= self.ess <= 1:
            raise RecipeError(f"ess={self.ess} is a share of the particles: expected 0 (never resample) to 1 (always)")

    def check_rewards(self, judges: Judges) -> None:
        judges.require_steering(self.name)

    def check(self, task: Task) -> None:
        super().check(task)
        if self.noise_of(task.policy.path).deterministic:
            raise RecipeError(
                f"{self.name!r} copies particles, and noise={self.noise} would leave the copies alike; "
                "give a level above 0"
            )
        if task.num_steps < 2:
            raise RecipeError(
                f"{self.name!r} needs at least 2 steps, the last of which adds no noise; given "
                f"num_steps={task.num_steps}; method='best_of_n' works with one"
            )

    def rows(self, budget: float) -> int:
        return int(budget)

    def count(self, num_steps: int, budget: float) -> int:
        """How many particles a budget pays."""
        return int(budget)

    def noise_of(self, path: Path) -> Noise:
        """What the sampler adds on this path."""
        if isinstance(self.noise, Noise):
            return self.noise
        kind, published = ("ddim", 1.0) if isinstance(path, VariancePreserving) else ("flow_sde", 0.7)
        return Noise(kind, published if self.noise is None else float(self.noise))

    def draw(self, task: Task, cond: Any, rng: list[torch.Generator]) -> Found:
        found, log_weights = self.particles(task, cond, rng)
        return found[chosen(self.pick, found.scores.total, log_weights, rng)]

    def particles(self, task: Task, cond: Any, rng: list[torch.Generator]) -> tuple[Found, Tensor]:
        """All K samples of each of P prompts, those of a prompt side by side, and their log-weights (P, K), float64."""
        count = self.count(task.num_steps, task.budget)
        own, steps = streams(rng, count), len(cond.timesteps)
        plan = full(steps, self.noise_of(task.policy.path))
        together = cond.repeat(count)
        cloud = Cloud(task, together, rng, count, self.resampling, self.ess)
        run = self.run(cloud, plan)
        rolled = task.rollout(together, own, plan, steer=run)
        found = task.score(rolled.x0, together)
        return found, run.end(found.scores.total)

    def run(self, cloud: Cloud, plan: Plan) -> Run:
        """What steers one run."""
        raise NotImplementedError


@dataclass(frozen=True)
class FK(Particles):
    """Feynman-Kac steering (2501.06848): K particles for a budget of K, any reward, no gradients.

    1. At every moment the clean estimates of all particles are decoded and scored.
    2. Their weights are multiplied by the potential; where weights have become uneven, good particles are copied over
       bad ones, within a prompt.
    3. The samples are scored; the last potential makes the product exp(strength * reward) exactly.

    Attributes:
        potential: "diff" exp(strength (r - r_last)), "max" of the highest so far, "add" of the sum so far, "rt" of r;
            "is" (weights at the end only) and "bon" (the best at the end) do not steer.
        every, start, stop: moments, as shares of the steps.
    """

    name: ClassVar[str] = "fk"

    potential: Potential = "diff"
    every: float = 0.2
    start: float = 0.2
    stop: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("potential", self.potential, POTENTIALS)
        if not (0 < self.every <= 1 and 0 <= self.start <= self.stop <= 1):
            raise RecipeError(
                f"every={self.every}, start={self.start}, stop={self.stop} are shares of the steps: expected "
                "0 < every <= 1 and 0 <= start <= stop <= 1"
            )

    def moments(self, num_steps: int) -> list[int]:
        """The steps before which particles are weighed."""
        if self.potential in ("is", "bon"):
            return []
        number = int((self.stop - self.start) / self.every + 1e-9) + 1
        return sorted({min(round((self.start + i * self.every) * num_steps), num_steps - 2) for i in range(number)})

    def calls(self, num_steps: int, budget: float) -> Calls:
        scored = len(self.moments(num_steps)) + 1
        return Calls(denoiser=num_steps, decodes=scored, rewards=scored) * int(budget)

    def run(self, cloud: Cloud, plan: Plan) -> FKRun:
        moments = frozenset(self.moments(plan.num_steps))
        return FKRun(cloud, self.potential, self.strength, moments, cloud.start(self.potential))


@dataclass(frozen=True)
class DAS(Particles):
    """Diffusion alignment as sampling (2501.05803): tempered sequential Monte Carlo with proposals that follow the
    gradient of the reward. Differentiable rewards.

    1. After i steps the reward counts by min(1, (1 + gamma)^i - 1).
    2. Every stochastic step's mean is shifted by std^2 times the gradient of what the clean estimate is worth.
    3. The weights correct for the shift, exactly; where they have become uneven, particles are resampled.

    Attributes:
        strength: 1 / alpha of the paper (aesthetic score: 200, CLIP: 100, PickScore: 10,000).
        gamma: tempering, published 0.008 for 100 steps. None: such that it ends at 1.
        through: "x0": the slope of the denoiser is that of data of unit variance, no denoiser backward; "denoiser":
            its own, by a second call at every shifted step.
        clip: the largest shift, in standard deviations of the step (norm over all positions); None: no bound. Weights
            correct for whatever shift was made.
        gradient_batch: particles that are differentiated at once, 1 for the least memory; None: all.
        checkpointing: compute activations again at backward, in the decoder (and the denoiser, through it), as far as
            their classes can.
    """

    name: ClassVar[str] = "das"

    resampling: Resampling = "ssp"
    gamma: float | None = None
    through: Through = "x0"
    clip: float | None = None
    gradient_batch: int | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("through", self.through, get_args(Through))
        for name in ("gamma", "clip", "gradient_batch"):
            value = vars(self)[name]
            if value is not None and not value > 0:
                raise RecipeError(f"{name}={value} must be above 0, or None")

    def check_rewards(self, judges: Judges) -> None:
        judges.require_differentiable(self.name)

    def check(self, task: Task) -> None:
        super().check(task)
        if self.count(task.num_steps, task.budget) < 1:
            raise RecipeError(
                f"budget={task.budget:g} pays no particle: through='denoiser' costs nearly twice a plain "
                "sample; give budget=2 or more, or through='x0'"
            )

    def shifted(self, num_steps: int) -> range:
        """The steps whose mean is shifted: all but the first, where the reward counts nothing, and the last, which has
        no noise."""
        return range(1, num_steps - 1)

    def count(self, num_steps: int, budget: float) -> int:
        second = len(self.shifted(num_steps)) if self.through == "denoiser" else 0
        return int(budget * num_steps / (num_steps + second) + 1e-9)

    def calls(self, num_steps: int, budget: float) -> Calls:
        shifted = len(self.shifted(num_steps))
        second = shifted if self.through == "denoiser" else 0
        one = Calls(num_steps + second, second, 0, 0, shifted + 1, shifted, shifted + 1)
        return one * self.count(num_steps, budget)

    def particles(self, task: Task, cond: Any, rng: list[torch.Generator]) -> tuple[Found, Tensor]:
        saving = recomputing(task.policy, self.through == "denoiser") if self.checkpointing else nullcontext()
        with saving:
            return super().particles(task, cond, rng)

    def run(self, cloud: Cloud, plan: Plan) -> DASRun:
        gamma = tempering_rate(plan.num_steps) if self.gamma is None else self.gamma
        own = (gamma, self.through, self.clip, self.gradient_batch)
        return DASRun(cloud, plan, self.strength, *own, cloud.start("diff"))
