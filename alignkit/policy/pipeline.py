"""Any diffusers pipeline as a policy: the pipeline is the adapter.

The user's own `DiffusionPipeline` runs its own code, one step at a time (see `session.py`): text encoding, guidance,
packing, expert switching and image conditioning are the pipeline's. Only the solver is ours, first order.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from alignkit.errors import RecipeError
from alignkit.flow.path import Prediction
from alignkit.flow.plan import Plan
from alignkit.flow.transition import Noise, Reduce, Transition, per_sample_generators
from alignkit.policy.adapters import Full, LoRA, denoisers, weights_for
from alignkit.policy.attention import ChosenAttention, resolve
from alignkit.policy.codec import Codec
from alignkit.policy.conditioning import Conditioning
from alignkit.policy.driver import Driver
from alignkit.policy.features import features, first_blocks
from alignkit.policy.lora_formats import load_lora
from alignkit.policy.memory import Decode, Offloaded, offload_encoders, remember, set_decoding
from alignkit.policy.onestep import mixed_step, one_step, visit_of
from alignkit.policy.rolling import Poll, Rolling, prediction_of, steps_of, transition_at, velocity_at, with_repeats
from alignkit.policy.session import Stop, Visit
from alignkit.types import Prompt, Rollouts, Steer

Rng = torch.Generator | list[torch.Generator]


class Policy:
    """A diffusers pipeline whose denoisers can be trained, sampled stochastically and compared with their reference.

    Args:
        pipe: a loaded `DiffusionPipeline`. It is left as it was: `close()` (or the context manager) removes adapters
            and restores flags; all runs happen on shallow copies.
        train: `LoRA(...)` for adapters, `Full()` for all denoiser weights, None for inference only.
        init_lora: a LoRA file or folder (diffusers, kohya or PEFT keys) whose layers, ranks, alphas and values the
            trained adapter starts from. `reference()` is the pipeline without it; LoRAs that the pipeline has loaded
            itself stay active beside it, frozen.
        attention: "auto", "sdpa", "xformers", or a backend of diffusers; see `attention.resolve`. What really ran is
            checked at the first `condition` and kept in `policy.attention.kernels`.

    Raises:
        PolicyError: the pipeline does something alignkit cannot drive; the message says what.
    """

    def __init__(
        self,
        pipe: Any,
        train: LoRA | Full | None = None,
        *,
        init_lora: str | Path | None = None,
        attention: str = "auto",
    ) -> None:
        self.pipe = pipe
        self.driver = Driver(pipe)
        resolve(attention, self.driver.device, training=train is not None)
        initial = None if init_lora is None else load_lora(init_lora, pipe)
        self.path = self.driver.grid.path
        self.prediction: Prediction = self.driver.grid.prediction
        self._put_back = remember(pipe)
        self.weights = weights_for(pipe, train, initial)
        self.attention = ChosenAttention(denoisers(pipe), attention, self.driver.device, training=train is not None)
        self._offloaded: Offloaded | None = None
        self._lock = threading.RLock()
        self.codec = Codec(self.driver)
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        train: LoRA | Full | None = None,
        *,
        init_lora: str | Path | None = None,
        attention: str = "auto",
        **kwargs: Any,
    ) -> Policy:
        """`DiffusionPipeline.from_pretrained(model, **kwargs)` as a policy."""
        pipe = DiffusionPipeline.from_pretrained(model, **kwargs)
        return cls(pipe, train, init_lora=init_lora, attention=attention)

    # weights

    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer sees."""
        return self.weights.parameters()

    def reference(self) -> Any:
        """Context: the weights as they were before training (adapters off). Gradients to inputs are allowed."""
        return self._using("reference")

    def old(self) -> Any:
        """Context: the weights of the last `snapshot("old")`; no gradients."""
        return self._using("old")

    def ema(self) -> Any:
        """Context: the moving average of the weights; no gradients."""
        return self._using("ema")

    @contextmanager
    def _using(self, name: str) -> Iterator[None]:
        with self._lock, self.weights.using(name):
            yield

    def snapshot(self, name: str, decay: float = 0.0) -> None:
        """Move the companion `old` or `ema` to decay * itself + (1 - decay) * the trained weights."""
        self.weights.snapshot(name, decay)

    # conditioning

    def condition(
        self, prompts: str | Sequence[str], num_steps: int = 28, seed: int | Sequence[int] = 0, **call: Any
    ) -> Conditioning:
        """Encode prompts once and read the pipeline's own grid.

        Args:
            prompts: one or B prompts.
            num_steps: denoising steps.
            seed: of the pipeline's own draws before its loop (VAE posterior, mask noise); sample i gets seed + i.
            call: the pipeline's own keywords (height, guidance_scale, negative_prompt, image, ...). Lists with one
                text or picture per prompt go with their sample; everything else holds for all.

        Raises:
            RecipeError: a keyword that the pipeline does not have, or one that alignkit sets itself.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise RecipeError("condition needs at least one prompt")
        named = [p if isinstance(p, Prompt) else Prompt(p, id=i) for i, p in enumerate(texts)]
        seeds = [seed + i for i in range(len(named))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(named):
            raise RecipeError(f"{len(seeds)} seeds for {len(named)} prompts; give one seed or one per prompt")
        with self._lock, self._onloaded(), self.attention.observing():
            return self.driver.condition(named, num_steps, seeds, call)

    def offload_encoders(self, keep: Collection[str] = ()) -> Offloaded:
        """Move text and image encoders off the accelerator, except the components in `keep` (those that an active
        self-reward needs). They come back for the time of each later `condition`; `close` brings them back for good.

        Returns:
            what was moved, the bytes freed, and a sentence that says so.
        """
        with self._lock:
            if self._offloaded is not None:
                self._offloaded.restore()
            self._offloaded = offload_encoders(self.pipe, keep)
            return self._offloaded

    def _onloaded(self) -> AbstractContextManager[None]:
        return nullcontext() if self._offloaded is None else self._offloaded.onloaded()

    # denoising

    def initial_latents(self, cond: Conditioning, rng: Rng) -> torch.Tensor:
        """(B, ...) float32: the pipeline's own initial latents at the first sigma, as `scheduler.step` sees them."""
        found: list[torch.Tensor] = []

        def on_step(index: int, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found.append(sample)
            raise Stop

        with self._lock:
            session = self.driver.session(cond, visits=[Visit(0, pretend=True)], on_step=on_step)
            session.observe(cond.layout.denoisers)
            self.driver.run(session, cond, generators=_per_sample(rng, len(cond)))
        return found[0].detach().float()

    def model_output(self, x: torch.Tensor, t: torch.Tensor | float, cond: Conditioning) -> torch.Tensor:
        """Exactly what the pipeline hands to `scheduler.step` for latents `x` at timestep `t`; gradients flow.

        Args:
            x: (B, ...) latents as `scheduler.step` sees them (variance-exploding samplers: scaled to unit variance).
            t: network time, a number or (B,); off the grid, step-dependent options use the nearest step.

        Returns:
            (B, ...) in the pipeline's dtype.
        """
        if len(x) != len(cond):
            raise RecipeError(f"{len(x)} latents for a conditioning of {len(cond)} samples")
        times = torch.as_tensor(t)
        with self._lock:
            if times.ndim == 0:
                return one_step(self.driver, x, visit_of(float(times), cond), cond)
            if times.shape != (len(x),):
                raise RecipeError(f"timesteps of shape {tuple(times.shape)} for {len(x)} samples; give one or (B,)")
            return mixed_step(self.driver, x, [float(v) for v in times], cond)

    def sigma_of(self, t: torch.Tensor | float, cond: Conditioning) -> torch.Tensor:
        """sigma in [0, 1] of network times; on the grid, the grid's own value. Same shape as `t`, float32."""
        times = torch.as_tensor(t).double().cpu()
        sigma = self.driver.grid.sigma_of(times)
        near = (cond.timesteps.double().cpu() - times[..., None]).abs()
        on_grid = cond.sigmas[:-1][near.argmin(-1)]
        return torch.where(near.amin(-1) == 0, on_grid, sigma)

    def timestep_of(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """The network time of a noise level; inverse of `sigma_of`."""
        return self.driver.grid.timestep_of(sigma)

    def prediction_at(self, x: torch.Tensor, t: torch.Tensor | float, cond: Conditioning) -> torch.Tensor:
        """(B, ...) float32: what the denoiser predicts at latents `x` and timestep `t`, in its own parametrisation
        (`policy.prediction`), in alignkit's sense of sigma; gradients flow."""
        return prediction_of(self.driver, self.model_output(x, t, cond))

    def velocity(self, x: torch.Tensor, t: torch.Tensor | float, cond: Conditioning) -> torch.Tensor:
        """(B, ...) float32 dx/dsigma of the policy's path at latents `x` and timestep `t`."""
        return velocity_at(self.driver, self.prediction_at(x, t, cond), x, self.sigma_of(t, cond))

    def features(
        self,
        x: torch.Tensor,
        t: torch.Tensor | float,
        cond: Conditioning,
        depth: int,
        blocks: torch.nn.ModuleList | None = None,
    ) -> torch.Tensor:
        """(B, N, D) float32: hidden states after the denoiser's first `depth` blocks, without guidance; gradients flow
        to `x`, and the rest of the denoiser does not run.

        Args:
            x, t: as in `model_output`.
            depth: 1 is the first block; see `features.blocks_of`.
            blocks: `depth` modules that stand in for the first blocks for this call, such as `first_blocks` trained
                as a reward; None: the denoiser's own.

        Raises:
            RecipeError: a depth that the denoiser does not have, or another number of blocks.
        """
        with self._lock:
            return features(self.model_output, denoisers(self.pipe), x, t, cond, depth, blocks)

    def first_blocks(self, depth: int) -> torch.nn.ModuleList:
        """Copies of the denoiser's first `depth` blocks, without adapters."""
        return first_blocks(denoisers(self.pipe), depth)

    def transition(
        self,
        x: torch.Tensor,
        index: int,
        cond: Conditioning,
        noise: Noise,
        mask: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> Transition:
        """The Gaussian of step `index` of the grid from latents `x`; the same one that `rollout` samples from, with
        `shift` (B, ...), what steered it, added to the velocity."""
        v = self.velocity(x, cond.timesteps[index], cond)
        return transition_at(self.driver, v if shift is None else v + shift, x, index, cond, noise, mask)

    # whole runs

    @torch.no_grad()
    def rollout(
        self,
        cond: Conditioning,
        plan: Plan,
        rng: Rng,
        *,
        latents: torch.Tensor | None = None,
        stop: int | None = None,
        reduce: Reduce = "mean",
        poll: Poll | None = None,
        steer: Steer | None = None,
        repeats: Mapping[int, int] | None = None,
        record: bool = True,
    ) -> Rollouts:
        """Run the pipeline once with our solver from step `plan.start` on; record the plan's stochastic steps.

        Positions that the pipeline overwrites after every step (masks, fixed frames) get no noise and leave the
        log-probability. A run that is stopped at a step and continued from there is the uninterrupted run.

        Args:
            plan: `plan.num_steps` must be the grid's length.
            rng: one generator, or one per sample; step noise comes from it, and initial latents that are not given.
            latents: (B, ...) what enters step `plan.start`; None: the pipeline's own initial latents.
            stop: the step before which the run ends; `x0` of the result is then what would enter that step. None: the
                end of the grid.
            reduce: of the recorded log-probabilities over positions, "mean" or "sum".
            poll: called before every step; may raise to stop.
            steer: called at every step with what the step is about to do, returns what it does instead; it may call
                this policy itself. See `alignkit.types.Step`.
            repeats: step -> how often it runs; in between its result is taken back to its noise level with fresh
                noise (time travel, FreeDoM 2303.09833). None: every step once.
            record: keep the stochastic steps; only training needs them.

        Raises:
            RecipeError: a plan for another grid, or repeats of a pipeline that writes known parts over its latents.
        """
        steps = with_repeats(steps_of(plan, cond, latents, stop), repeats or {})
        if cond.layout.blends and len(set(steps)) < len(steps):
            raise RecipeError(
                f"repeats={dict(repeats or {})}: {type(self.pipe).__name__} writes known parts over its latents at the "
                "noise level of the next step, so a step of it cannot run again; leave the repeats out"
            )
        generators = _per_sample(rng, len(cond))
        with self._lock:
            mask = self.driver.free_mask(cond) if plan.stochastic else None
            start = self.initial_latents(cond, generators) if latents is None else latents.float()
            return Rolling(self.driver, cond, plan, generators, reduce, poll, start, mask, steer, record).run(steps)

    def decode(self, x0: torch.Tensor, cond: Conditioning, frames: int | None = None) -> torch.Tensor:
        """Media float32 in [0, 1]: (B, 3, H, W) or (B, T, 3, H, W), by the pipeline's own un-packing, decoder and
        post-processing; differentiable. Outside [0, 1] the gradient passes straight through.

        Safety checker and watermark are left out (said once); sampling with the pipeline itself keeps them.

        Args:
            frames: only the first so many frames of videos: (B, frames, 3, H, W), the same as of the whole. A causal
                decoder is given the latents that they need and no others (see `latent_frames`), another one all.

        Raises:
            RecipeError: more frames than the videos have, or frames of pictures.
        """
        with self._lock:
            return self.codec.decode(x0, cond, frames)

    def set_decoding(self, how: Decode) -> None:
        """How `decode` trades time for memory from now on; `close` puts the decoder's settings back.

        Raises:
            RecipeError: the decoder has not such a setting.
        """
        with self._lock:
            set_decoding(self.pipe, how)
            self.codec.batch = how.batch

    def num_frames(self, cond: Conditioning) -> int:
        """Frames of a video that is decoded whole. Raises RecipeError for a pipeline of pictures."""
        with self._lock:
            return self.codec.num_frames(self._any_latents(cond), cond[[0]])

    def latent_frames(self, frames: int | None, cond: Conditioning) -> int:
        """How many latent frames of each video `decode` decodes for its first `frames` frames; None: for all."""
        with self._lock:
            return self.codec.latent_frames(self._any_latents(cond), cond[[0]], frames)

    def _any_latents(self, cond: Conditioning) -> torch.Tensor:
        return self.initial_latents(cond[[0]], [torch.Generator().manual_seed(cond.seeds[0])])

    def encode(self, media: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """(B, ...) float32 clean latents of media, as `scheduler.step` sees them: the inverse of `decode`, up to what
        the VAE loses. Without gradient.

        Args:
            media: (B, 3, H, W) or (B, T, 3, H, W) in [0, 1], in the size of the conditioning.

        Raises:
            RecipeError: media of another size than the conditioning's.
            PolicyError: a pipeline whose latents cannot be found from pixels; the message says why.
        """
        if len(media) != len(cond):
            raise RecipeError(f"{len(media)} media for a conditioning of {len(cond)} samples")
        like = self.initial_latents(cond, [torch.Generator().manual_seed(seed) for seed in cond.seeds])
        with self._lock:
            return self.codec.encode(media, cond, like)

    def close(self) -> None:
        """Put back everything that sharing modules could have changed; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.attention.close()
        self.weights.close()
        if self._offloaded is not None:
            self._offloaded.restore()
        self._put_back()

    def __enter__(self) -> Policy:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _per_sample(rng: Rng, count: int) -> list[torch.Generator]:
    if isinstance(rng, torch.Generator):
        return per_sample_generators(rng, count)
    if len(rng) != count:
        raise RecipeError(f"{len(rng)} generators for {count} samples; give one, or one per sample")
    return list(rng)
