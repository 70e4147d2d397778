"""What a guided image costs beside an unguided one on the benchmark's tiny SD 3, with every method's default settings.

Timed is everything between the encoded prompt and the scored image, in processor time of one thread; each run of a
method is followed by an unguided run of the same prompts, and `ratio` is the median over such pairs. Memory is the
peak of live tensors over the unguided peak, with at most as many samples denoised at once as unguided, weights included
and without them. Rewards cost next to nothing here (a mean of pixels; the head of `nrg` runs a third of the denoiser's
blocks), so the ratios are those of denoising, decoding, and their gradients.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignkit.inference.guide import method_of, run
from alignkit.inference.judges import Judges
from alignkit.inference.method import BestOfN, Method
from alignkit.inference.task import Task
from alignkit.policy import Policy
from alignkit.rewards.noise_aware import NoiseAwareReward, write_random
from alignkit.rewards.noisy_head import HeadConfig
from alignkit.training.benchmark_pipeline import TEXT_LENGTH, WIDTH, tiny_sd3
from alignkit.training.live_tensors import peak_bytes, weights_of

PAIRS = 2  # timed, after one whose memory is counted
STEPS, PIXELS, BATCH = 8, 64, 4
PROMPTS = ("a red sign", "a blue sign", "a green sign", "a black sign")


@dataclass(frozen=True)
class Measured:
    """A method of the table.

    Attributes:
        steps: of the sampler.
        budget: None: the method's default.
        noisy: it follows a reward that knows noise.
    """

    method: str
    steps: int = STEPS
    budget: float | None = None
    noisy: bool = False


GUIDANCE: Mapping[str, Measured] = {
    "best_of_n": Measured("best_of_n"),
    "nrg": Measured("nrg", noisy=True),
    "dps": Measured("dps"),
    "dps, through the denoiser": Measured('dps(through="denoiser")', budget=2.0),
    "fk": Measured("fk"),
    "das": Measured("das"),
    "search, over noise": Measured("search"),
    "search, over paths": Measured('search(over="paths")'),
    "search, over drafts": Measured('search(over="drafts")'),
    "reno, 1 step": Measured("reno", steps=1),
}


@dataclass
class Bed:
    """The pipeline and rewards that all methods are measured on."""

    policy: Policy
    judges: Mapping[bool, Judges]  # by whether the reward knows noise

    @classmethod
    def of(cls, policy: Policy, folder: Path) -> Bed:
        """The head of the noise-aware reward is random and lies in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_random(folder, policy, HeadConfig(type(policy.pipe).__name__, ("any",), WIDTH, depth=2))
        judges = {False: Judges("brightness"), True: Judges(NoiseAwareReward(str(folder), "any"))}
        for one in judges.values():
            one.bind(policy)
        return cls(policy, judges)

    def conditioned(self, steps: int) -> Any:
        """The prompts, encoded."""
        call = {"height": PIXELS, "width": PIXELS, "guidance_scale": 1.0, "max_sequence_length": TEXT_LENGTH}
        return self.policy.condition(PROMPTS, num_steps=steps, **call)

    def draw(self, method: Method, budget: float, cond: Any, noisy: bool) -> Task:
        """One image of each prompt; returns what was spent."""
        task = Task(self.policy, self.judges[noisy], len(cond.timesteps), budget, BATCH)
        method.check(task)
        run(method, task, cond, [torch.Generator().manual_seed(i) for i in range(len(cond))])
        return task


def guidance(folder: Path) -> list[dict[str, Any]]:
    """One record per method, in the order of `GUIDANCE`; about three minutes on one CPU core."""
    with Policy(tiny_sd3()) as policy:
        bed = Bed.of(policy, folder / "head")
        return [measured(name, one, bed) for name, one in GUIDANCE.items()]


def measured(name: str, one: Measured, bed: Bed, pairs: int = PAIRS) -> dict[str, Any]:
    """A method beside unguided sampling."""
    method, cond = method_of(one.method), bed.conditioned(one.steps)
    budget = method.default_budget if one.budget is None else one.budget
    own, plain = (method, budget, cond, one.noisy), (BestOfN(), 1.0, cond, one.noisy)
    weights = sum(t.untyped_storage().nbytes() for t in weights_of(bed.policy.pipe))
    tasks: list[Task] = []
    peak, plain_peak = (peak_bytes(bed.policy.pipe, lambda w=what: tasks.append(bed.draw(*w))) for what in (own, plain))
    seconds, plain_seconds = zip(*((_seconds(bed, own), _seconds(bed, plain)) for _ in range(pairs)), strict=True)
    return {
        "method": name,
        "budget": budget,
        "denoiser_calls": tasks[0].spent.denoiser / (one.steps * len(PROMPTS)),
        "seconds": statistics.median(seconds) / len(PROMPTS),
        "plain_seconds": statistics.median(plain_seconds) / len(PROMPTS),
        "ratio": statistics.median(a / b for a, b in zip(seconds, plain_seconds, strict=True)),
        "peak_bytes": peak,
        "plain_peak_bytes": plain_peak,
        "memory_ratio": peak / plain_peak,
        "memory_ratio_without_weights": (peak - weights) / (plain_peak - weights),
    }


def _seconds(bed: Bed, what: tuple[Method, float, Any, bool]) -> float:
    """Of processor time, so that a busy machine gives the same ratios."""
    began = time.process_time()
    bed.draw(*what)
    return time.process_time() - began


COLUMNS = ("method", "denoiser calls", "s per image", "unguided", "ratio", "peak memory", "without weights")


def rows(found: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """The table for people, in the order of `COLUMNS`."""
    for one in found:
        seconds = [f"{one[name]:.3f}" for name in ("seconds", "plain_seconds")]
        ratios = [f"{one[name]:.2f}" for name in ("ratio", "memory_ratio", "memory_ratio_without_weights")]
        yield [one["method"], f"{one['denoiser_calls']:.4g}", *seconds, *ratios]
