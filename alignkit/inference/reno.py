"""ReNO: the first noise of a few-step generator, optimised by reward gradients through the whole sampler (2406.04312).

Algorithm
1. x0 = the deterministic sampler from noise z; r = the total reward of x0, decoded.
2. g = gradient of `-r + regularity * (|z|^2 / 2 - (d - 1) log |z|)`, its norm clipped at `clip`.
3. z moves by SGD with Nesterov momentum.
4. Again; of each prompt the sample with the largest reward is kept.

Deliberate deviations from the published code: the norm is clipped sample by sample, so that a sample does not depend on
its batch, and rewards enter with the weights of the call (published: HPS 5, ImageReward 1, CLIP 0.01, PickScore 0.05).
The published generators take one step. More steps work: with `checkpoint` each runs again for its gradient, so memory
holds the activations of one step, or of the decoder and the rewards, whichever are larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import reduce
from torch import Tensor

from alignkit.errors import RecipeError
from alignkit.flow.guidance import norms
from alignkit.flow.transition import ODE
from alignkit.inference.judges import Judges
from alignkit.inference.method import Calls, Method
from alignkit.inference.runs import rows_where
from alignkit.inference.saving import recomputable
from alignkit.inference.search import require_pure_noise
from alignkit.inference.steering import pulled_back, require_finite, reward_gradient, shortened
from alignkit.inference.task import Found, Task, comparable, pieces_of, streams
from alignkit.policy.conditioning import Conditioning
from alignkit.policy.memory import checkpointing

FEW_STEPS = 4


@dataclass(frozen=True)
class ReNO(Method):
    """Noise optimisation; the budget is the number of iterations.

    One iteration is the denoiser calls of one plain sample and, but for the last, their backward. Every step is run
    once more in that backward where `checkpoint` is on; like the backward itself, that is no part of the budget and is
    not counted as a denoiser call.

    Attributes:
        lr, momentum: of SGD with Nesterov momentum.
        clip: the largest norm of one sample's gradient.
        regularity: weight of `norm_regulariser`, which keeps the noise as long as Gaussian noise is.
        checkpoint: keep one step's activations at a time and run every step again for its gradient; the decoder, where
            its class can, computes its own again.
        gradient_batch: samples that are differentiated at once, 1 for the least memory; None: all.
    """

    name: ClassVar[str] = "reno"
    default_budget: ClassVar[float] = 50.0

    lr: float = 5.0
    momentum: float = 0.9
    clip: float = 0.1
    regularity: float = 0.01
    checkpoint: bool = True
    gradient_batch: int | None = None

    def __post_init__(self) -> None:
        if self.gradient_batch is not None and self.gradient_batch < 1:
            raise RecipeError(f"gradient_batch={self.gradient_batch}; expected at least 1, or None for all at once")
        for name, value in {"lr": self.lr, "clip": self.clip}.items():
            if not value > 0.0:
                raise RecipeError(f"{name}={value} must be above 0")
        if not 0.0 <= self.momentum < 1.0:
            raise RecipeError(f"momentum={self.momentum} must lie in [0, 1); published: 0.9")
        if not self.regularity >= 0.0:
            raise RecipeError(f"regularity={self.regularity} must be at least 0; published: 0.01")

    def check_rewards(self, judges: Judges) -> None:
        """Raises RecipeError where a reward gives no gradient."""
        judges.require_differentiable(self.name)

    def calls(self, num_steps: int, budget: float) -> Calls:
        """What one prompt costs; the last iterate needs no gradient, and the best one is decoded once more."""
        count = int(budget)
        return Calls(
            denoiser=count * num_steps,
            denoiser_gradients=(count - 1) * num_steps,
            decodes=count + 1,
            decode_gradients=count - 1,
            rewards=count + 1,
        )

    def draw(self, task: Task, cond: Any, rng: list[torch.Generator]) -> Found:
        """The best sample on each prompt's way through the noises."""
        require_steppable(cond)
        z = task.policy.initial_latents(cond, streams(rng, 1))
        other = task.policy.initial_latents(cond, streams(rng, 1))
        require_pure_noise(z, other, "noise optimisation")
        free = z != other  # what is the same in both is given, and stays
        if task.num_steps > FEW_STEPS:
            task.note("advice", f"{task.num_steps} steps: noise optimisation is meant for 1 to {FEW_STEPS}")
        buffer, best_x0, best = None, z, torch.full((len(z),), torch.nan, device=z.device)
        for iteration in range(1, int(task.budget) + 1):
            x0, reward, gradient = self._looked(task, z, free, cond, iteration < int(task.budget))
            task.note("reward", reward.tolist())
            task.note("noise_norm", norms(z * free).tolist())
            better = (comparable(reward) > comparable(best)) | (iteration == 1)
            best = torch.where(better, reward, best)
            best_x0 = rows_where(better, x0, best_x0)
            if gradient is not None:
                require_finite(gradient, cond, f"iteration {iteration}")
                z, buffer = nesterov_step(z, buffer, shortened(gradient, self.clip), self.lr, self.momentum)
        return task.score(best_x0, cond)

    def _looked(
        self, task: Task, z: Tensor, free: Tensor, cond: Any, follow: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Clean latents (P, ...) of noise z, their rewards (P,) and, if asked for, the loss's gradient (P, ...)."""
        if not follow:
            with torch.no_grad():
                x0 = trajectory(task, z, cond)[-1]
                return x0, task.reward_of_clean(x0, cond), None
        pieces = pieces_of(len(z), self.gradient_batch or len(z))
        with checkpointing(recomputable(task.policy, denoiser=False) if self.checkpoint else {}):
            looked = [self._followed(task, z[rows], free[rows], cond[rows]) for rows in pieces]
        x0, reward, gradient = (torch.cat(each) for each in zip(*looked, strict=True))
        return x0, reward, gradient

    def _followed(self, task: Task, z: Tensor, free: Tensor, cond: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The same of samples that are differentiated at once, with the gradient."""
        noise = z.detach().requires_grad_()
        with torch.set_grad_enabled(not self.checkpoint):
            states = trajectory(task, noise, cond)
        reward, gradient = reward_gradient(task.reward_of_clean, states[-1], cond)
        if self.checkpoint:
            gradient = back_to_noise(task, states, cond, gradient)
        else:
            (gradient,) = torch.autograd.grad(states[-1], noise, gradient)
        with torch.enable_grad():
            (inwards,) = torch.autograd.grad(norm_regulariser(noise, free).sum(), noise)
        return states[-1].detach(), reward, (self.regularity * inwards - gradient).masked_fill(~free, 0.0)


# formulas


def norm_regulariser(z: Tensor, free: Tensor) -> Tensor:
    """(P,) `|z|^2 / 2 - (d - 1) log |z|` of the d numbers of each of z (P, ...) that are `free` (P, ...): minus the
    log-density of the length of Gaussian noise, up to a constant (ReNO, 2406.04312); least where |z|^2 = d - 1."""
    norm, d = norms(z * free), reduce(free.to(z), "p ... -> p", "sum")
    return norm.square() / 2.0 - (d - 1) * norm.log()


def nesterov_step(
    z: Tensor, buffer: Tensor | None, gradient: Tensor, lr: float, momentum: float
) -> tuple[Tensor, Tensor]:
    """(next z, next buffer), all (P, ...): SGD with Nesterov momentum as `torch.optim.SGD` does it."""
    buffer = gradient if buffer is None else momentum * buffer + gradient
    return z - lr * (gradient + momentum * buffer), buffer


# the sampler with gradients


def trajectory(task: Task, z: Tensor, cond: Any) -> list[Tensor]:
    """What enters every step of the deterministic sampler from first latents z (P, ...), and the clean latents."""
    states = [z]
    for index, t in enumerate(cond.timesteps):
        task.poll()
        states.append(stepped(task, index, cond, states[-1], task.velocity(states[-1], t, cond)))
    return states


def back_to_noise(task: Task, states: list[Tensor], cond: Any, gradient: Tensor) -> Tensor:
    """The gradient (P, ...) with respect to the first of `states` from that with respect to the last.

    Every step is run again, alone. Not with torch's checkpointing: that would call the policy from autograd's own
    thread, and the lock of a policy belongs to the thread that holds it.
    """
    for index in reversed(range(len(cond.timesteps))):
        task.poll()
        task.spent.denoiser_gradients += len(gradient)

        def step(x: Tensor, own: Any, index: int = index) -> Tensor:
            return stepped(task, index, own, x, task.policy.velocity(x, cond.timesteps[index], own))

        gradient = pulled_back(step, states[index], cond, gradient)
    return gradient


def stepped(task: Task, index: int, cond: Any, x: Tensor, v: Tensor) -> Tensor:
    """(P, ...) what follows latents x with velocity v at step `index`."""
    s = cond.sigmas
    return ODE.build(task.policy.path, x, v, float(s[index]), float(s[index + 1]), float(s[1])).mean


def require_steppable(cond: Any) -> None:
    """Raise where single steps, one after another, are not the pipeline's run.

    Raises:
        RecipeError: the loop puts known parts into the latents after every step.
    """
    if isinstance(cond, Conditioning) and cond.layout.blends:
        raise RecipeError(
            "this pipeline puts known parts (a mask, given frames) into the latents after every step of its loop, and "
            "noise optimisation takes its steps without the loop; use method='best_of_n' or 'search'"
        )
