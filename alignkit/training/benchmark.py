"""What alignkit adds to a pipeline: the share of a round's time, and the ratio of its memory, on a tiny SD 3.

The pipeline is built from the configuration below with random weights. One round of GRPO (2 prompts x 4 samples,
64 px, 10 steps of which 9 are trained) runs on one thread through the same `Run.round` that trains a recipe.

* Time. Compute is what passes inside the denoiser's own forward, its backward (from the moment the gradient reaches
  its output until its last adapter has one), the decoder, and the reward functions. Everything else is overhead:
  prologue, encoders, scheduler, log-probabilities, optimizer, logging. `overhead` = 1 - compute / wall time.
* Memory. Bytes of all tensors that are alive, weights included, at their peak: of a round, over that of a bare loop
  of the same denoiser calls (as many without gradient, then as many forward and backward). Counted where PyTorch
  hands out tensors, so buffers that live only inside one kernel are not seen, in either.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from alignkit.policy import LoRA
from alignkit.rewards import load
from alignkit.training.benchmark_guidance import guidance
from alignkit.training.benchmark_methods import methods, silent
from alignkit.training.benchmark_pipeline import TEXT_LENGTH, tiny_sd3
from alignkit.training.benchmark_video import video
from alignkit.training.grpo import GRPO
from alignkit.training.live_tensors import peak_bytes
from alignkit.training.run import Run
from alignkit.training.run_dir import RunDir
from alignkit.training.signals import StopFlag
from alignkit.types import Prompt

ROUNDS = {8: 3, 1: 1}  # measured, by batch; a round in single samples takes three times as long
PIXELS, SAMPLES = 64, 8
PROMPTS = ("a red sign", "a blue sign", "a green sign", "a black sign")


def recipe(folder: Path, batch: int) -> GRPO:
    """The round that is measured: `batch` samples per rollout and per backward."""
    return GRPO(
        model=str(folder / "model"),
        prompts=str(folder / "prompts.txt"),
        rewards={"brightness": 1.0, "jpeg_compressibility": 0.1},
        call={"height": PIXELS, "width": PIXELS, "guidance_scale": 1.0, "max_sequence_length": TEXT_LENGTH},
        train=LoRA(rank=8, alpha=16.0),
        num_steps=10,
        prompts_per_step=2,
        group_size=SAMPLES // 2,
        rollout_batch=batch,
        micro_batch=batch,
        eval_prompts=str(folder / "prompts.txt"),
    )


# time


@dataclass
class Clock:
    """Seconds of compute by part, and the open interval of a backward."""

    seconds: dict[str, float] = field(default_factory=dict)
    began: float | None = None
    reached: float = 0.0

    def add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time added to `part`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(part, time.perf_counter() - began)

        return call

    def entered(self, gradient: torch.Tensor) -> None:
        """The gradient has reached the denoiser's output."""
        self.close()
        self.began = self.reached = time.perf_counter()

    def arrived(self, parameter: torch.Tensor) -> None:
        """A parameter has its gradient; the last one ends the backward."""
        self.reached = time.perf_counter()

    def close(self) -> None:
        """Count the backward that is open, if one is."""
        if self.began is not None:
            self.add("denoiser_backward", self.reached - self.began)
        self.began = None


class TimedReward:
    """A reward whose own time is counted."""

    kind = "image"

    def __init__(self, name: str, clock: Clock) -> None:
        self.own = load(name)
        self.name, self.differentiable = self.own.name, self.own.differentiable
        self.call = clock.timed("rewards", self.own)

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> Any:
        return self.call(media, prompts)


@contextmanager
def watched(run: Run, clock: Clock) -> Iterator[None]:
    """Context: the denoiser, its backward, and the decoder report to the clock."""
    denoiser, vae = run.policy.pipe.transformer, run.policy.pipe.vae
    forward = clock.timed("denoiser_forward", denoiser.forward)

    def observed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(clock.entered)
        return output

    handles = [p.register_post_accumulate_grad_hook(clock.arrived) for p in run.parameters]
    denoiser.forward = observed
    vae.decode = clock.timed("decoder", vae.decode)
    try:
        yield
    finally:
        del denoiser.forward, vae.decode
        for handle in handles:
            handle.remove()


def timed_rounds(run: Run, clock: Clock, rounds: int) -> list[dict[str, float]]:
    """Seconds by part, "total" among them, of `rounds` rounds after one that warms up."""
    found: list[dict[str, float]] = []
    with watched(run, clock):
        for step in range(rounds + 1):
            clock.seconds.clear()
            began = time.perf_counter()
            run.directory.log(step, run.round(step))
            clock.close()
            found.append({**clock.seconds, "total": time.perf_counter() - began})
    return found[1:]


def overhead(parts: Mapping[str, float]) -> float:
    """Share of the total that is no compute."""
    return 1.0 - sum(v for n, v in parts.items() if n != "total") / parts["total"]


# memory


@contextmanager
def recorded(denoiser: Any, calls: list[tuple[bool, dict[str, Any]]]) -> Iterator[None]:
    """Context: every denoiser call is noted: whether it had a gradient, and its arguments."""
    own = denoiser.forward

    def forward(**kwargs: Any) -> Any:
        calls.append((torch.is_grad_enabled(), kwargs))
        return own(**kwargs)

    denoiser.forward = forward
    try:
        yield
    finally:
        del denoiser.forward


def bare_loop(run: Run, calls: Sequence[tuple[bool, dict[str, Any]]]) -> None:
    """The same denoiser calls, and nothing around them."""
    denoiser = run.policy.pipe.transformer
    for gradient, arguments in calls:
        with torch.set_grad_enabled(gradient):
            output = denoiser(**arguments)[0]
        if gradient:
            output.square().mean().backward()
    run.optimizer.zero_grad(set_to_none=True)


def memory_ratio(run: Run, step: int) -> dict[str, float]:
    """Peaks of a round and of the bare loop of its denoiser calls, in bytes, and their ratio."""
    calls: list[tuple[bool, dict[str, Any]]] = []
    with recorded(run.policy.pipe.transformer, calls):
        run.round(step)
    # one set of inputs stands for all, so that the bare loop does not pay for a trajectory that it does not keep
    calls = [(gradient, calls[0][1]) for gradient, _ in calls]
    ours = peak_bytes(run.policy.pipe, lambda: run.round(step + 1))
    bare = peak_bytes(run.policy.pipe, lambda: bare_loop(run, calls))
    return {"memory_ratio": ours / bare, "peak_bytes": float(ours), "bare_peak_bytes": float(bare)}


# the benchmark


def bench(batches: Sequence[int] = (8, 1)) -> dict[str, Any]:
    """Measure; takes about six minutes on one CPU core.

    Returns:
        a JSON record: `overhead` and `overhead_batch1` (shares of wall time, medians where rounds are several),
        `memory_ratio`, for each batch the seconds by part, `methods`: what an update of each method costs,
        `guidance`: what a guided image costs, and `video`: memory of decoding against the number of frames.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="alignkit-bench-") as name:
            folder = Path(name)
            _write_inputs(folder)
            tables = {"methods": methods(folder), "guidance": guidance(folder), "video": video()}
            return _bench(folder, batches) | tables
    finally:
        torch.set_num_threads(threads)


def _write_inputs(folder: Path) -> None:
    tiny_sd3().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")


def _bench(folder: Path, batches: Sequence[int]) -> dict[str, Any]:
    record: dict[str, Any] = {"samples": SAMPLES, "pixels": PIXELS, "threads": 1, "batches": {}}
    for batch in batches:
        clock = Clock()
        made = recipe(folder, batch)
        rewards = {TimedReward(name, clock): weight for name, weight in made.rewards.items()}
        run = Run(replace(made, rewards=rewards), RunDir.create(folder / f"batch{batch}"), StopFlag())
        run.display.say = silent
        try:
            rounds = timed_rounds(run, clock, ROUNDS[batch])
            shares = [overhead(parts) for parts in rounds]
            middle = rounds[shares.index(statistics.median_low(shares))]
            record["overhead" if batch == 8 else f"overhead_batch{batch}"] = statistics.median_low(shares)
            record["batches"][str(batch)] = {"seconds": middle, "overhead_of_each_round": shares}
            if batch == 8:
                record |= memory_ratio(run, len(rounds) + 1)
                parameters = sum(p.numel() for p in run.policy.pipe.transformer.parameters())
                record["denoiser_parameters"] = parameters
        finally:
            run.policy.close()
    return record


def lines(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what, how much) for people."""
    size = f"{record['denoiser_parameters'] / 1e6:.1f} M parameters"
    yield "setting", f"tiny SD 3 ({size}), {record['samples']} samples, {record['pixels']} px, one thread"
    yield "overhead, batch 8", f"{100 * record['overhead']:.1f} %"
    yield "overhead, batch 1", f"{100 * record['overhead_batch1']:.1f} %"
    yield "memory", f"{record['memory_ratio']:.2f} x a bare loop of the same denoiser calls"
    for batch, found in record["batches"].items():
        parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.2f}" for name, seconds in found["seconds"].items())
        yield f"seconds of a round, batch {batch}", parts
