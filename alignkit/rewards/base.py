"""What a reward is, and the one place where what a reward gets and returns is checked.

A reward is a callable `(media, prompts) -> (B,)`, higher is better, with a `name`, a `kind` and
`differentiable`. A plain function is one too, see `functions`.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.weights import MissingWeights
from alignkit.types import Prompt

SHAPES: Mapping[str, str] = {"image": "(B, 3, H, W)", "video": "(B, T, 3, H, W)", "latent": "(B, ...)"}


@runtime_checkable
class Reward(Protocol):
    """A callable that scores media.

    Attributes:
        name: what its scores are called in metrics and reports.
        kind: "image" scores (B, 3, H, W), "video" (B, T, 3, H, W), both float in [0, 1]; "latent" (B, ...).
        differentiable: whether gradients flow from the scores to the media.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def differentiable(self) -> bool: ...

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> Any:
        """One score per sample; what may be returned instead of a (B,) tensor is in `to_evaluation`."""
        ...


@runtime_checkable
class ChecksPrompts(Protocol):
    """A reward that can say before any image exists that a prompt cannot be scored."""

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError naming the first prompt that has not what the reward needs."""
        ...


@runtime_checkable
class AnswersRaw(Protocol):
    """A reward whose unconverted answer tells "not applicable" from "failed", which a (B,) tensor cannot."""

    def raw(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> Any: ...


@runtime_checkable
class Prepares(Protocol):
    """A reward that reads its weights lazily and can be told to read them now."""

    def prepare(self) -> None:
        """Raises what the first call would raise, before a run has spent anything."""
        ...


@runtime_checkable
class Binds(Protocol):
    """A reward that is part of the generator it scores, such as a self-reward."""

    def bind(self, policy: Any) -> Reward:
        """The same reward with what it needs of the policy (`policy.pipe` is the user's pipeline).

        Raises:
            RecipeError: this pipeline cannot do it; names the component and its class.
        """
        ...


@runtime_checkable
class Pairwise(Protocol):
    """A judge that compares. `combine.WinRate` makes it a reward, asking both orders.

    Attributes:
        name, kind: as of a reward.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    def compare(self, first: torch.Tensor, second: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) probability in [0, 1] that `first[i]`, shown first, is better; 0.5 is a tie, NaN no verdict."""
        ...


@runtime_checkable
class Mapped(Protocol):
    """A reward that also says where: one number per region of each image."""

    def maps(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B, h, w)."""
        ...


@runtime_checkable
class OfFrames(Protocol):
    """A video reward that looks at some frames only, so that the others need not be decoded.

    Attributes:
        name, kind, differentiable: as of a reward; kind is "video".
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def differentiable(self) -> bool: ...

    def chosen(self, num_frames: int, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B, S) int64 indices from 0 of the frames that it looks at in videos of `num_frames`."""
        ...

    def of_frames(
        self, frames: torch.Tensor, index: torch.Tensor, num_frames: int, prompts: Sequence[Prompt]
    ) -> Evaluation:
        """The same as of the whole videos, from the chosen frames (B, S, 3, H, W) alone, `index` (B, S) being
        `chosen(num_frames, prompts)`."""
        ...


@runtime_checkable
class ScoresGroups(Protocol):
    """A reward whose scores depend on the other samples of the same prompt, so it must see whole groups.

    Attributes:
        groupwise: True.
    """

    groupwise: bool


@runtime_checkable
class NoiseAware(Protocol):
    """A reward of latents at any noise level, which may guide sampling at every step (`alignkit.guide`, method "nrg").

    A plain function of `(latents, sigma, cond)` with an attribute `noise_aware = True` is one too.

    Attributes:
        name, kind, differentiable: as of a reward; "latent" and True.
        noise_aware: False where it was trained on clean latents only: it then scores them and guides nothing.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def differentiable(self) -> bool: ...

    @property
    def noise_aware(self) -> bool: ...

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
        """(B,) of latents (B, ...) at noise levels sigma (B,), 1 = noise, under a `Conditioning` of B samples."""
        ...


@dataclass(frozen=True, eq=False)
class OfClean:
    """A noise-aware reward of clean latents, as rewards are called."""

    reward: NoiseAware
    cond: Any
    kind: str = "latent"
    differentiable: bool = True

    @property
    def name(self) -> str:
        return self.reward.name

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) of clean latents (B, ...)."""
        return self.reward(media, torch.zeros(len(media), device=media.device), self.cond)


class RewardFailure(RewardError):
    """The reward's own code failed on these samples. The only error that `on_error="mask"` may make NaN."""


class BrokenContract(RewardError):
    """What a reward was given or returned is not what rewards are given and return. Never masked."""


@dataclass(frozen=True)
class Evaluation:
    """One reward of one batch.

    Attributes:
        scores: (B,) float32 on the media's device; NaN where the reward does not apply to the sample.
        applicable: (B,) bool, False where the reward answered `None`.
    """

    scores: torch.Tensor
    applicable: torch.Tensor

    @property
    def failed(self) -> torch.Tensor:
        """(B,) bool: the reward applies and yet gave no finite number."""
        return self.applicable & ~self.scores.detach().isfinite()


def evaluate(reward: Reward, media: torch.Tensor, prompts: Sequence[str]) -> Evaluation:
    """Call a reward and check everything the contract promises.

    Args:
        media: float in [0, 1], any floating dtype, shaped as the reward's `kind` says.
        prompts: B prompts.

    Raises:
        RewardFailure: the reward's own code raised.
        BrokenContract: wrong media, a wrong answer, media changed in place, or a missing gradient.
    """
    known = as_prompts(prompts)
    check_media(reward, media, len(known))
    media = media.float()
    wants_gradient = reward.differentiable and media.requires_grad and torch.is_grad_enabled()
    with unchanged(reward.name, media):
        raw = _answer(reward, media, known)
    evaluation = to_evaluation(raw, reward.name, len(known), media.device)
    if wants_gradient and not evaluation.scores.requires_grad and bool(evaluation.applicable.any()):
        raise BrokenContract(
            f"reward {reward.name!r} says differentiable=True but its scores carry no gradient: it detaches, "
            "rounds, or leaves torch on the way. Keep every operation in torch or set differentiable=False"
        )
    return evaluation


def _answer(reward: Reward, media: torch.Tensor, prompts: list[Prompt]) -> Any:
    call = reward.raw if isinstance(reward, AnswersRaw) else reward
    try:
        if reward.differentiable:
            return call(media, prompts)
        with torch.no_grad():
            return call(media.detach(), prompts)
    except (RecipeError, BrokenContract, MissingWeights):  # never right, so no failure of these samples
        raise
    except Exception as error:  # the user's own code may raise anything; it is named, never swallowed
        shown = ", ".join(f"{p.id} {_short(p)}" for p in prompts[:3]) + (", ..." if len(prompts) > 3 else "")
        message = f"reward {reward.name!r} failed on {len(prompts)} samples (prompts {shown}): "
        raise RewardFailure(f"{message}{type(error).__name__}: {error}") from error


def _short(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def as_prompts(prompts: Sequence[str]) -> list[Prompt]:
    """Prompts as `Prompt`; plain text gets its place in the list as id."""
    if isinstance(prompts, str):
        raise BrokenContract(f"prompts is one text, expected a list with one prompt per sample: [{_short(prompts)}]")
    return [p if isinstance(p, Prompt) else Prompt(p, id=i) for i, p in enumerate(prompts)]


def check_media(reward: Reward, media: torch.Tensor, num_prompts: int) -> None:
    """Raises BrokenContract where the media have not the type, shape or number that the reward scores."""
    shape = tuple(media.shape)
    if not media.dtype.is_floating_point:
        raise BrokenContract(
            f"reward {reward.name!r} was given {media.dtype} media; expected float in [0, 1]: media / 255"
        )
    if reward.kind == "image" and media.ndim == 5:
        raise BrokenContract(
            f"reward {reward.name!r} scores images {SHAPES['image']} and was given video {shape}; score "
            f"every frame with alignkit.rewards.PerFrameMean({reward.name!r})"
        )
    expected = {"image": 4, "video": 5, "latent": media.ndim}[reward.kind]
    if media.ndim != expected or (reward.kind != "latent" and media.shape[-3] != 3):
        raise BrokenContract(f"reward {reward.name!r} scores {reward.kind} media {SHAPES[reward.kind]}; given {shape}")
    if media.shape[0] != num_prompts:
        raise BrokenContract(f"reward {reward.name!r} was given {media.shape[0]} samples and {num_prompts} prompts")


@contextmanager
def unchanged(name: str, media: torch.Tensor) -> Iterator[None]:
    """Raises BrokenContract when the body writes into `media`, in torch or through a NumPy view of it."""

    def state() -> tuple[int, float]:
        # Inference tensors count no versions. Only memory on the CPU can be written past the counter.
        version = 0 if media.is_inference() else media._version
        summed = media.is_inference() or media.device.type == "cpu"
        return version, media.detach().sum(dtype=torch.float64).item() if summed else 0.0

    before = state()
    yield
    after = state()
    if after[0] != before[0] or (after[1] != before[1] and not np.isnan(before[1])):
        raise BrokenContract(
            f"reward {name!r} changed the media it was given, which the other rewards and the report also "
            "see; work on media.clone()"
        )


def to_evaluation(raw: Any, name: str, batch: int, device: torch.device) -> Evaluation:
    """(B,) float32 scores from whatever a reward returned.

    Accepted: a tensor or array (B,) of any real dtype on any device; a list or tuple of B numbers,
    one-element tensors (gradients are kept) or `None` (the reward does not apply to this sample); a single
    number when B is 1.

    Raises:
        BrokenContract: anything else, naming the reward and the index.
    """
    if isinstance(raw, Evaluation):
        return raw
    if isinstance(raw, (np.ndarray, np.generic)):
        raw = raw.tolist() if raw.dtype.kind in "OUSV" else torch.from_numpy(np.array(raw))
    if isinstance(raw, (list, tuple)):
        return _from_list(list(raw), name, batch, device)
    if isinstance(raw, numbers.Real):
        raw = torch.tensor(float(raw))
    if not isinstance(raw, torch.Tensor):
        raise BrokenContract(f"reward {name!r} returned {type(raw).__name__}; expected {batch} numbers, one per sample")
    if raw.ndim == 0 and batch == 1:
        raw = raw.reshape(1)
    if raw.ndim != 1 or raw.shape[0] != batch:
        raise BrokenContract(f"reward {name!r} returned shape {tuple(raw.shape)}; expected ({batch},), one per sample")
    if raw.is_complex():
        raise BrokenContract(f"reward {name!r} returned complex numbers; expected real ones")
    scores = raw.to(device=device, dtype=torch.float32)
    return Evaluation(scores, torch.ones(batch, dtype=torch.bool, device=device))


def _from_list(raw: list[Any], name: str, batch: int, device: torch.device) -> Evaluation:
    if len(raw) != batch:
        raise BrokenContract(f"reward {name!r} returned {len(raw)} scores; expected {batch}, one per sample")
    converted: list[torch.Tensor] = []
    for index, value in enumerate(raw):
        if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim <= 1 and value.shape in ((), (1,)):
            number = torch.as_tensor(value).reshape(())
        elif isinstance(value, (numbers.Real, np.bool_)):
            number = torch.tensor(float(value))
        elif value is None:
            number = torch.tensor(float("nan"))
        else:
            raise BrokenContract(
                f"reward {name!r} returned {type(value).__name__} {_short(str(value))} for sample {index}; "
                "expected a number, or None where the reward does not apply"
            )
        converted.append(number.to(device=device, dtype=torch.float32))
    applicable = torch.tensor([value is not None for value in raw], dtype=torch.bool, device=device)
    scores = torch.stack(converted) if converted else torch.empty(0, device=device)
    return Evaluation(scores, applicable)
