"""What one update of every method costs on the benchmark's tiny SD 3: denoiser calls, seconds, and the plain share.

All methods train the same number of samples (2 prompts x 4, 64 px) at two recorded steps or noise levels each, DPO the
pair of best and worst of each group. Timed is what a round does once samples are scored: from weights to the
optimizer's step, in processor time of one thread. `plain` is a bare forward and backward of the same rows in the same
batches, so `ratio` - 1 is what the method adds (about a half for each forward without gradient: a backward through
frozen weights costs no more than a forward) and what alignkit adds.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from alignkit.flow.transition import Noise
from alignkit.policy import LoRA, Policy
from alignkit.training.awm import AWM
from alignkit.training.benchmark_pipeline import TEXT_LENGTH
from alignkit.training.crd import CRD
from alignkit.training.dgpo import DGPO
from alignkit.training.dpo import DPO
from alignkit.training.euphonium import Euphonium
from alignkit.training.experience import join_scores
from alignkit.training.grpo import GRPO
from alignkit.training.kto import KTO
from alignkit.training.learner import numbered
from alignkit.training.nft import NFT
from alignkit.training.recipe import Recipe
from alignkit.training.regional import Regional
from alignkit.training.run import Run
from alignkit.training.run_dir import RunDir
from alignkit.training.rwr import ADRPO, ORW, RWR, SFT
from alignkit.training.signals import StopFlag
from alignkit.training.value_gradient import ValueGradient
from alignkit.types import Prompt

UPDATES = 3  # timed, after one that warms up
STEPS, VIEWS = 4, 2
PIXELS = 64
DISTILLED: Mapping[str, Any] = {"process_weight": 0.5, "distil_beta": 0.1}


class Halves:
    """A reward with maps: the left half of every picture is right, the right half is not."""

    name, kind, differentiable = "halves", "image", True

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        return media.mean(dim=(1, 2, 3))

    def maps(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        return torch.tensor([[1.0, -0.5]]).expand(len(media), 1, 2)


class Faint:
    """A noise-aware reward: latents near 0."""

    name, kind, differentiable, noise_aware = "faint", "latent", True, True

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
        return -latents.square().flatten(1).mean(dim=1)


METHODS: Mapping[str, tuple[type[Recipe], Mapping[str, Any]]] = {
    "Flow-GRPO, window of 2": (GRPO, {"plan": "window", "noise": Noise("cps", 0.7)}),
    "Flow-GRPO, KL": (GRPO, {"plan": "window", "noise": Noise("cps", 0.7), "kl_beta": 0.01}),
    "Euphonium": (Euphonium, {"plan": "window", "noise": Noise("cps", 0.7), "guide": {Faint(): 1.0}, **DISTILLED}),
    "Flow-DPO": (DPO, {}),
    "Diffusion-KTO": (KTO, {}),
    "DGPO": (DGPO, {}),
    "SFT, all samples": (SFT, {"keep": "all"}),
    "Flow-RWR": (RWR, {}),
    "ORW-CFM-W2": (ORW, {}),
    "ADRPO": (ADRPO, {}),
    "DiffusionNFT": (NFT, {}),
    "AWM": (AWM, {}),
    "CRD": (CRD, {}),
    "regional (SRUM)": (Regional, {"rewards": {Halves(): 1.0}}),
    "velocity-gradient matching": (ValueGradient, {"guide": {Faint(): 1.0}}),
}


def recipe_of(method: str, folder: Path) -> Recipe:
    """The round of one method; `folder` holds `model` and `prompts.txt`."""
    kind, own = METHODS[method]
    shared: dict[str, Any] = {
        "model": str(folder / "model"),
        "prompts": str(folder / "prompts.txt"),
        "eval_prompts": str(folder / "prompts.txt"),
        "rewards": {"brightness": 1.0},
        "call": {"height": PIXELS, "width": PIXELS, "guidance_scale": 1.0, "max_sequence_length": TEXT_LENGTH},
        "train": LoRA(rank=8, alpha=16.0),
        "num_steps": STEPS,
        "prompts_per_step": 2,
        "group_size": 4,
    }
    return kind(**{**shared, **own})


@dataclass
class Calls:
    """Denoiser calls by role: "training" where a gradient flows, else whose weights ran.

    Attributes:
        calls, rows: how many, and their batch rows.
        arguments: of the last call with a gradient.
    """

    calls: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    arguments: dict[str, Any] = field(default_factory=dict)


@contextmanager
def observed(policy: Policy, denoiser: torch.nn.Module) -> Iterator[Calls]:
    """Context: notes the calls of a denoiser that takes `hidden_states` by keyword."""
    found, active = Calls(), ["current"]
    own, using = denoiser.forward, policy.weights.using

    def forward(**kwargs: Any) -> Any:
        role = "training" if torch.is_grad_enabled() else active[-1]
        found.calls[role] += 1
        found.rows[role] += len(kwargs["hidden_states"])
        if role == "training":
            found.arguments = kwargs
        return own(**kwargs)

    @contextmanager
    def named(name: str) -> Iterator[None]:
        active.append(name)
        try:
            with using(name):
                yield
        finally:
            active.pop()

    denoiser.forward = forward
    vars(policy.weights)["using"] = named
    try:
        yield found
    finally:
        del denoiser.forward, vars(policy.weights)["using"]


def methods(folder: Path) -> list[dict[str, Any]]:
    """One record per method, in the order of `METHODS`; about half a minute on one CPU core."""
    return [_measured(method, folder) for method in METHODS]


def _measured(method: str, folder: Path) -> dict[str, Any]:
    recipe = recipe_of(method, folder)
    run = Run(recipe, RunDir.create(folder / "methods" / recipe_name(method)), StopFlag())
    run.display.say = run.learner.say = silent
    try:
        experiences = run.collect(0)
        scores = join_scores([e.scores for e in experiences])
        weights, live = recipe.weigh(scores, run.rewards.weights, numbered([e.groups for e in experiences]))

        def update(step: int) -> None:
            run.learner.learn(step, experiences, weights, live, run.flag.poll)

        denoiser = run.policy.pipe.transformer
        with observed(run.policy, denoiser) as seen:
            update(0)
        seconds = _median([_seconds(lambda step=step: update(step)) for step in range(1, UPDATES + 1)])
        plain = _median([_seconds(lambda: _plain(run, seen)) for _ in range(UPDATES)])
    finally:
        run.policy.close()
    return {
        "method": method,
        "calls": dict(seen.calls),
        "rows": dict(seen.rows),
        "seconds": seconds,
        "plain_seconds": plain,
        "ratio": seconds / plain,
    }


def recipe_name(method: str) -> str:
    """A method's name as a folder's."""
    return "-".join(word.strip(",()").lower() for word in method.split())


def _plain(run: Run, seen: Calls) -> None:
    """As many forwards and backwards of the denoiser as an update has, in its batches, and nothing around them."""
    denoiser = run.policy.pipe.transformer
    arguments = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in seen.arguments.items()}
    for _ in range(seen.calls["training"]):
        denoiser(**arguments)[0].square().mean().backward()
    run.optimizer.zero_grad(set_to_none=True)


def _seconds(work: Callable[[], None]) -> float:
    """Of processor time, so that a busy machine gives the same ratios."""
    began = time.process_time()
    work()
    return time.process_time() - began


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def silent(sentence: str) -> None:
    """The benchmark prints its own table."""


COLUMNS = ("method", "calls: gradient", "none", "rows: gradient", "none", "s per update", "plain", "ratio")


def rows(found: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """The table for people, in the order of `COLUMNS`."""
    for one in found:
        numbers: list[str] = []
        for counts in (one["calls"], one["rows"]):
            numbers += [str(counts["training"]), str(sum(counts.values()) - counts["training"])]
        yield [one["method"], *numbers, f"{one['seconds']:.3f}", f"{one['plain_seconds']:.3f}", f"{one['ratio']:.2f}"]
