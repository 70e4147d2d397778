"""Reward guidance while sampling: `alignkit.guide` on any diffusers pipeline, which is left as it was."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from alignkit.errors import RecipeError
from alignkit.flow.transition import per_sample_generators
from alignkit.inference.judges import Judges, Spec
from alignkit.inference.method import Method
from alignkit.inference.task import Found, Task, pieces_of
from alignkit.policy import Policy
from alignkit.rewards.loading import split_options
from alignkit.rewards.pixels import to_uint8

METHODS: dict[str, str] = {
    "best_of_n": "alignkit.inference.method:BestOfN",
    "nrg": "alignkit.inference.gradients:NRG",
    "dps": "alignkit.inference.gradients:DPS",
    "fk": "alignkit.inference.particles:FK",
    "das": "alignkit.inference.particles:DAS",
    "search": "alignkit.inference.search:Search",
    "reno": "alignkit.inference.reno:ReNO",
}


@dataclass(frozen=True)
class Guided:
    """What `guide` returns, one sample per prompt.

    Attributes:
        media: (B, 3, H, W) or (B, T, 3, H, W) float in [0, 1], like all tensors here on the CPU.
        rewards: (B,) weighted sum.
        parts: raw rewards by name, each (B,); judges too.
        latents: (B, ...) clean latents as the pipeline's scheduler sees them.
        trace: what happened: method and its options, `budget`, `spent` (see `Calls`), `budget_used` (denoiser calls
            over those of one plain sample per prompt), `seconds` (without those of judges), and what the method noted.
    """

    media: torch.Tensor
    rewards: torch.Tensor
    parts: Mapping[str, torch.Tensor]
    latents: torch.Tensor
    trace: Mapping[str, Any]

    @property
    def images(self) -> list[Image.Image]:
        """The media as pictures, a video as its frames beside each other."""
        rows = self.media if self.media.ndim == 4 else rearrange(self.media, "b t c h w -> b c h (t w)")
        return [Image.fromarray(pixels) for pixels in to_uint8(rows.detach().float().cpu())]


def guide(
    pipe: Any,
    prompts: str | Sequence[str],
    rewards: Mapping[Any, float] | Spec,
    method: str | Method = "best_of_n",
    budget: float | None = None,
    rng: torch.Generator | list[torch.Generator] | None = None,
    *,
    num_steps: int | None = None,
    seed: int | Sequence[int] = 0,
    batch: int = 16,
    judges: Iterable[Spec] = (),
    progress: bool = True,
    **call: Any,
) -> Guided:
    """Sample from a pipeline what rewards prefer, without training it.

    Which to choose: `best_of_n` works with any reward and cannot fail; `fk` uses the same budget better where rewards
    of half-drawn samples say something; `nrg` is the cheapest and needs noise-aware rewards; `dps` and `das` need
    differentiable rewards (`das` keeps diversity); `search` refines noises, paths or drafts with any reward; `reno`
    is for generators of one to four steps.

    Args:
        pipe: a `DiffusionPipeline` with whatever LoRAs it has loaded, or a `Policy`. A pipeline is left unmodified.
        prompts: one or B.
        rewards: {spec or callable: weight}, or one; specs as `alignkit.rewards.load` takes them.
        method: a name of `METHODS`, also with options, `'fk(potential="max")'`, or an instance, `FK(potential="max")`.
        budget: denoiser calls over those of one plain sample per prompt; 1 is as dear as unguided sampling. None: the
            method's own default.
        rng: one generator, or one per prompt; None: seeded with 0. Sample i does not depend on the others.
        num_steps: of the sampler, 28 by default; `num_inference_steps` means the same.
        seed: of the pipeline's own draws before its loop, see `Policy.condition`.
        batch: samples that are denoised at once; at least as many as the method needs of one prompt.
        judges: rewards that are reported in `parts` and have no say.
        progress: show a bar in a terminal.
        call: the pipeline's own keywords (height, guidance_scale, negative_prompt, image, ...).

    Raises:
        RecipeError: an unknown method or keyword, or rewards that the method cannot use; says which could.
    """
    chosen = method_of(method)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    own = Judges(rewards, judges)
    with ExitStack() as stack:
        policy = pipe if isinstance(pipe, Policy) else stack.enter_context(Policy(pipe))
        own.bind(policy)
        own.check_prompts(texts)
        cond = policy.condition(texts, num_steps=steps_of(num_steps, call), seed=seed, **call)
        given = chosen.default_budget if budget is None else budget
        task = Task(policy, own, len(cond.timesteps), given, batch, cond.sigmas)
        chosen.check(task)
        if progress:
            task.on_step = stack.enter_context(bar(chosen, task, len(cond)))
        return run(chosen, task, cond, generators_of(rng, len(cond)))


def run(method: Method, task: Task, cond: Any, rng: list[torch.Generator]) -> Guided:
    """Draw one sample per prompt of `cond`, as many prompts at once as `task.batch` holds."""
    at_once = max(1, task.batch // method.rows(task.budget))
    pieces, seconds = [], 0.0
    for rows in pieces_of(len(cond), at_once):
        began = time.monotonic()
        drawn = method.draw(task, cond[rows], [rng[i] for i in rows])
        seconds += time.monotonic() - began
        pieces.append(task.judged(drawn, cond[rows]).to("cpu"))  # an accelerator holds a piece, not all prompts
    found = Found.joined(pieces)
    trace = {
        "method": method.name,
        "options": dataclasses.asdict(method),
        "budget": task.budget,
        "spent": asdict(task.spent),
        "budget_used": task.spent.denoiser / (task.num_steps * len(cond)),
        "seconds": seconds,
        **task.trace,
    }
    return Guided(found.media, found.scores.total, found.scores.parts, found.x0, trace)


def method_of(method: str | Method) -> Method:
    """The method that a name, with or without options, or an instance means.

    Raises:
        RecipeError: there is no such method (names the nearest) or option.
    """
    if isinstance(method, Method):
        return method
    name, options = split_options(method)
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
        raise RecipeError(f"there is no method {name!r}; nearest: {near!r}; all: {', '.join(METHODS)}")
    module, _, kind = METHODS[name].partition(":")
    made = vars(importlib.import_module(module))[kind]
    known = [field.name for field in dataclasses.fields(made)]
    wrong = [option for option in options if option not in known]
    if wrong:
        raise RecipeError(f"method {name!r} has no option {wrong[0]!r}; it takes {', '.join(known) or 'none'}")
    try:
        return made(**options)
    except (TypeError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"method {method!r}: an option has a value of the wrong kind ({error})") from error


def steps_of(num_steps: int | None, call: dict[str, Any]) -> int:
    """The number of steps; takes diffusers' own name for it out of `call`."""
    theirs = call.pop("num_inference_steps", None)
    if num_steps is not None and theirs is not None and num_steps != theirs:
        raise RecipeError(f"num_steps={num_steps} and num_inference_steps={theirs} are the same thing; give one")
    given = theirs if num_steps is None else num_steps
    return 28 if given is None else int(given)


def generators_of(rng: torch.Generator | list[torch.Generator] | None, count: int) -> list[torch.Generator]:
    """One generator per prompt."""
    if isinstance(rng, list):
        if len(rng) != count:
            raise RecipeError(f"{len(rng)} generators for {count} prompts; give one, or one per prompt")
        return rng
    return per_sample_generators(torch.Generator().manual_seed(0) if rng is None else rng, count)


@contextmanager
def bar(method: Method, task: Task, prompts: int) -> Iterator[Callable[[], None]]:
    """A progress bar over the denoiser calls of a task, and the function that moves it."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as shown:
        line = shown.add_task(method.name, total=method.calls(task.num_steps, task.budget).denoiser * prompts)
        yield lambda: shown.update(line, completed=task.spent.denoiser)
