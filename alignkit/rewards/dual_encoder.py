"""Rewards that compare an image with its prompt in one feature space: the cosine of two encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from alignkit.errors import RewardError
from alignkit.rewards.weights import on
from alignkit.types import Prompt


class Towers(Protocol):
    """Two encoders into one space, with the preprocessing that belongs to them.

    Attributes:
        network: everything that has weights.
        logit_scale: scalar; `exp(logit_scale)` multiplied the cosine in training.
    """

    network: nn.Module

    @property
    def logit_scale(self) -> torch.Tensor: ...

    def image(self, media: torch.Tensor) -> torch.Tensor:
        """(B, D) features, not normalised, of (B, 3, H, W) in [0, 1]; differentiable."""
        ...

    def text(self, texts: list[str], device: torch.device) -> torch.Tensor:
        """(B, D) features, not normalised. Longer texts are cut as the tokenizer does."""
        ...


class DualEncoder(ABC):
    """Cosine of image and text features; what a subclass adds is where its weights are and its scale."""

    kind: ClassVar[str] = "image"
    differentiable: ClassVar[bool] = True

    @abstractmethod
    def load(self) -> Towers:
        """Read the weights. Raises RewardError where they are missing or incomplete."""

    def scaled(self, cosine: torch.Tensor) -> torch.Tensor:
        """(B,) reward from the (B,) cosine in [-1, 1]."""
        return cosine

    @cached_property
    def towers(self) -> Towers:
        return self.load()

    def prepare(self) -> None:
        """Read the weights now; raises what the first call would raise."""
        _ = self.towers

    def image_features(self, media: torch.Tensor) -> torch.Tensor:
        """(B, D) float32 of length 1 from (B, 3, H, W) in [0, 1]; differentiable."""
        on(self.towers.network, media.device)
        return F.normalize(self.towers.image(media).float(), dim=-1)

    def text_features(self, prompts: Sequence[str], device: torch.device | None = None) -> torch.Tensor:
        """(B, D) float32 of length 1.

        Args:
            device: where to compute them; None: where the network is.
        """
        device = next(self.towers.network.parameters()).device if device is None else device
        on(self.towers.network, device)
        texts, rows = distinct(prompts)
        return F.normalize(self.towers.text(texts, device).float(), dim=-1)[rows]

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) float32."""
        if not len(prompts):
            return media.float().sum(dim=(1, 2, 3))
        images = self.image_features(media)
        return self.scaled(cosines(images, self.text_features(prompts, media.device)))


def cosines(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(B,) row by row, of two (B, D) of length 1."""
    return torch.einsum("bd,bd->b", first, second)


def distinct(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The texts without repetition, and for each prompt its place among them: a group shares one prompt."""
    places: dict[str, int] = {}
    rows = [places.setdefault(str(prompt), len(places)) for prompt in prompts]
    return list(places), rows


def fill(module: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> nn.Module:
    """Load exactly this state into the module.

    Raises:
        RewardError: a tensor is missing, has another shape, or has no place in the module; names it.
    """
    own = module.state_dict()
    refuse_incomplete(set(own) - set(state), source, type(module).__name__)
    extra = sorted(set(state) - set(own))
    if extra:
        raise RewardError(
            f"weights {source} hold {len(extra)} tensors that {type(module).__name__} has not: "
            f"{_first(extra)}; they are of another model"
        )
    wrong = [
        f"{n} {tuple(state[n].shape)}, expected {tuple(own[n].shape)}" for n in own if state[n].shape != own[n].shape
    ]
    if wrong:
        raise RewardError(f"weights {source} do not fit {type(module).__name__}: {_first(wrong)}")
    module.load_state_dict(dict(state))
    return module


def refuse_incomplete(missing: Iterable[str], source: str, model: str) -> None:
    """Raises RewardError naming the missing tensors: a network that is partly random gives scores without meaning."""
    names = sorted(missing)
    if names:
        raise RewardError(
            f"weights {source} lack {len(names)} tensors of {model}: {_first(names)}; the file is incomplete "
            "or of another model"
        )


def _first(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
