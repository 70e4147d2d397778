"""The scheduler that stands in for the pipeline's own while alignkit drives the loop, and the loop's `enumerate`.

The stand-in is an instance of a subclass of the pipeline's own scheduler class with the own scheduler's state, so the
pipeline finds every attribute and signature it looks for. It differs in five places: the grid, the input scaling (1),
the initial noise scale (1), what `step` does (it asks the session) and deep copies (refused).
"""

from __future__ import annotations

import builtins
import copy
import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

from alignkit.errors import PolicyError


class Session(Protocol):
    """What the stand-ins ask while a pipeline runs."""

    def on_grid(self, scheduler: Any) -> torch.Tensor: ...

    def on_step(self, model_output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def iterate(self, timesteps: Iterable[Any]) -> Iterator[tuple[int, Any]]: ...


def class_attribute(own: type, name: str) -> Any:
    """The attribute as the class defines it, or None: schedulers differ in which methods they have."""
    return next((vars(cls)[name] for cls in own.__mro__ if name in vars(cls)), None)


def input_scale(scheduler: SchedulerMixin, timestep: Any) -> float:
    """The factor of `scale_model_input` at one timestep: 1/sqrt(sigma^2+1) for variance-exploding samplers, else 1."""
    if class_attribute(type(scheduler), "scale_model_input") is None:
        return 1.0
    one = torch.ones(1, device=timestep.device if torch.is_tensor(timestep) else "cpu")
    return float(copy.copy(scheduler).scale_model_input(one, timestep))  # type: ignore[attr-defined]


@functools.cache
def _subclass(own: type) -> type:
    """A subclass of the pipeline's own scheduler class whose behaviour is the session's."""

    @functools.wraps(own.set_timesteps)  # pipelines read its signature
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        own.set_timesteps(self, *args, **kwargs)
        self.timesteps = self.alignkit_session.on_grid(self)
        self.order = 1
        self.num_inference_steps = len(self.timesteps)

    @functools.wraps(own.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(own.step).bind(self, *args, **kwargs).arguments
        previous, x0 = self.alignkit_session.on_step(bound["model_output"], bound["sample"])
        if bound.get("return_dict", True):
            return SchedulerOutput(prev_sample=previous)
        return previous, x0

    def scale_model_input(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return sample

    def refuse_copy(self: Any, memo: Any) -> Any:
        raise PolicyError(
            "this pipeline deep-copies its scheduler to denoise a second signal (audio, for example); alignkit drives "
            "one signal with one scheduler, so it cannot be aligned yet"
        )

    members: dict[str, Any] = {
        "set_timesteps": set_timesteps,
        "step": step,
        "init_noise_sigma": property(lambda self: 1.0, lambda self, value: None),
        "__deepcopy__": refuse_copy,
        "__module__": own.__module__,
    }
    if class_attribute(own, "scale_model_input") is not None:
        members["scale_model_input"] = functools.wraps(class_attribute(own, "scale_model_input"))(scale_model_input)
    if class_attribute(own, "add_noise") is not None:
        members["add_noise"] = _scaled_add_noise(own)
    return type(own.__name__, (own,), members)


def _scaled_add_noise(own: Any) -> Any:
    """Image-to-image pipelines noise a picture by the scheduler: bring the result to unit variance as well."""

    @functools.wraps(own.add_noise)
    def add_noise(self: Any, original: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        noised = own.add_noise(self, original, noise, timesteps)
        return noised * self.alignkit_session.scale_at(timesteps[:1])

    return add_noise


def stand_in(scheduler: SchedulerMixin, session: Any) -> Any:
    """A stand-in with the state of `scheduler`; the original is not touched."""
    twin = copy.copy(scheduler)
    vars(twin).pop("init_noise_sigma", None)
    twin.__class__ = _subclass(type(scheduler))
    twin.alignkit_session = session  # type: ignore[attr-defined]
    return twin


class GridIterable:
    """Timesteps on their way through a progress bar: iterating asks the session which iterations run."""

    def __init__(self, session: Session, timesteps: Iterable[Any]) -> None:
        self.session, self.timesteps = session, timesteps

    def __len__(self) -> int:
        return len(self.timesteps)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return (t for _, t in self.session.iterate(self.timesteps))


class LoopEnumerate:
    """Stands for `enumerate` inside one pipeline call: over the grid, only the iterations that the session wants."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def __call__(self, iterable: Iterable[Any], start: int = 0) -> Iterator[tuple[int, Any]]:
        if isinstance(iterable, GridIterable):
            return self.session.iterate(iterable.timesteps)
        if self.session.is_grid(iterable):
            return self.session.iterate(iterable)
        return builtins.enumerate(iterable, start)


class SilentBar:
    """A progress bar that shows nothing."""

    def __enter__(self) -> SilentBar:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def update(self, n: int = 1) -> None:
        return None

    def set_postfix(self, *args: Any, **kwargs: Any) -> None:
        return None
