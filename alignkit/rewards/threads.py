"""Rewards outside the main thread: what torch keeps per thread goes with the work, what is drawn is watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch

from alignkit.errors import RecipeError

T = TypeVar("T")


def inherited(work: Callable[[], T]) -> Callable[[], T]:
    """`work` with this thread's gradient mode, inference mode and autocast, wherever it is called.

    torch keeps these per thread, so that without them a reward in a worker would compute other numbers.
    """
    gradient, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]

    def run() -> T:
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(inference))
            modes.enter_context(torch.set_grad_enabled(gradient))
            for kind, dtype, enabled in casts:
                modes.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            return work()

    return run


@contextmanager
def draws_nothing(name: str, device: torch.device) -> Iterator[None]:
    """Raises RecipeError if the body draws from torch's global generators, which a rollout in another thread seeds
    and puts back: the draws would differ from run to run."""

    def state() -> list[torch.Tensor]:
        cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    before = state()
    yield
    if not all(torch.equal(a, b) for a, b in zip(before, state(), strict=True)):
        raise RecipeError(
            f"reward {name!r} draws from torch's global generator, which cannot be repeated beside a rollout; draw "
            "from a torch.Generator of its own, seeded by the prompt's id, or set rewards_beside=False"
        )
