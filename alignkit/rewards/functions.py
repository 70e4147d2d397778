"""A user's function as a reward. How it is called is decided by its signature, see `called_by_keyword`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignkit.errors import RecipeError
from alignkit.rewards.base import SHAPES, BrokenContract, Reward, evaluate
from alignkit.types import Prompt


@dataclass(frozen=True, eq=False)
class FunctionReward:
    """A user's function as a reward.

    Attributes:
        function: `(media, prompts)`, or in TRL's style, called by keyword.
        by_keyword: TRL's style: `prompts`, `images` and `completions` (the media), and a list per column.
    """

    function: Callable[..., Any]
    name: str
    kind: str = "image"
    differentiable: bool = False
    by_keyword: bool = False

    def raw(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> Any:
        """What the function itself returns."""
        if self.by_keyword:
            return self.function(**keyword_arguments(self.function, media, prompts))
        return self.function(media, list(prompts))

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) float32; NaN where the function answered `None`."""
        return evaluate(self, media, prompts).scores


@dataclass(frozen=True, eq=False)
class NoiseAwareFunction:
    """A user's function `(latents, sigma, cond) -> (B,)` as a noise-aware reward."""

    function: Callable[..., Any]
    name: str
    kind: str = "latent"
    differentiable: bool = True
    noise_aware: bool = True

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
        """What the function returns."""
        return self.function(latents, sigma, cond)


def as_reward(value: Any) -> Reward:
    """A reward from a reward, a class without required arguments, or a user's function.

    A function may declare `name`, `kind` and `differentiable` as attributes (`f.kind = "video"`); without
    them it has its own name, scores images, and is not differentiable. With `noise_aware = True` it is called with
    `(latents, sigma, cond)`.

    Raises:
        RecipeError: not callable, an unknown kind, or a signature that can be called in neither way.
    """
    if isinstance(value, type):
        value = value()
    reward: Any
    if isinstance(value, Reward):
        reward = value
    elif callable(value) and inspect.getattr_static(value, "noise_aware", False):
        reward = NoiseAwareFunction(value, inspect.getattr_static(value, "name", _own_name(value)))
    elif callable(value):
        reward = FunctionReward(
            function=value,
            name=inspect.getattr_static(value, "name", _own_name(value)),
            kind=inspect.getattr_static(value, "kind", "image"),
            differentiable=inspect.getattr_static(value, "differentiable", False),
            by_keyword=called_by_keyword(value),
        )
    else:
        raise RecipeError(
            f"a reward is a callable (media, prompts) -> (B,), a name of alignkit.rewards.TABLE, "
            f"'package.module:Name' or 'path/file.py:name'; given {type(value).__name__}: {value!r}"
        )
    if not isinstance(reward.name, str) or not reward.name:
        raise RecipeError(f"a reward's `name` is a text that is not empty; {value!r} has {reward.name!r}")
    if reward.kind not in SHAPES:
        raise RecipeError(f"reward {reward.name!r} has kind={reward.kind!r}; choose one of {', '.join(SHAPES)}")
    if not isinstance(reward.differentiable, bool):
        raise RecipeError(f"reward {reward.name!r}: `differentiable` is True or False, not {reward.differentiable!r}")
    return reward


def _own_name(function: Any) -> str:
    return function.__name__ if inspect.isroutine(function) else type(function).__name__


def called_by_keyword(function: Callable[..., Any]) -> bool:
    """Whether a user's function is called in the style users know from TRL.

    1. Its first parameter is `media`: by position, `(media, prompts)`.
    2. It takes `**kwargs`, has a parameter `images` or `completions`, or more than two parameters without a
       default: by keyword. `images` and `completions` are the media tensor, which iterates over samples as a list
       does; other names are columns of the prompts.
    3. Otherwise: by position.

    Raises:
        RecipeError: it would be called by position and does not take two arguments.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # some functions written in C have no signature
        return False
    if not parameters or parameters[0].name != "media":
        named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY)}
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if open_ended or named & {"images", "completions"} or len(required) > 2:
            return True
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise RecipeError(
            f"reward function {_own_name(function)}{inspect.signature(function)} cannot be called: expected "
            "(media, prompts), or in TRL's style (prompts, images, <columns>, **kwargs)"
        ) from error
    return False


def keyword_arguments(function: Callable[..., Any], media: torch.Tensor, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The keywords of a function in TRL's style; a row without the column gives `None` at its place.

    Raises:
        BrokenContract: the function asks for a column that no prompt of the batch has.
    """
    columns = {name: [p.columns.get(name) for p in prompts] for p in prompts for name in p.columns}
    offered = {**columns, "prompts": list(prompts), "images": media, "completions": media}
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.default is parameter.empty and parameter.name not in offered:
            raise BrokenContract(
                f"reward function {_own_name(function)} asks for a column {parameter.name!r}, which no "
                f"prompt of this batch has; columns found: {', '.join(sorted(columns)) or 'none'}. Add it to the "
                "prompt file, or give the parameter a default"
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    return {p.name: offered[p.name] for p in parameters if p.name in offered}
