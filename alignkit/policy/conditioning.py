"""What a policy is conditioned on: prompts, the pipeline's own keywords, seeds of its own draws, encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from alignkit.errors import RecipeError
from alignkit.policy.memo import Memo
from alignkit.types import Prompt

if TYPE_CHECKING:
    from alignkit.policy.driver import Driver, Layout


@dataclass(frozen=True)
class Conditioning:
    """B samples, ready to be denoised any number of times without encoding again.

    Attributes:
        prompts: B prompts.
        shared: keywords of the pipeline that hold for all samples (height, guidance_scale, ...).
        samples: keywords with one entry per sample (negative_prompt, image, ...).
        seeds: one per sample; the pipeline's own draws before its loop (VAE posterior, mask noise) come from them.
        num_steps: what was asked for.
        timesteps: (num_steps,) the pipeline's own grid as its loop sees it, dynamic shift included.
        sigmas: (num_steps + 1,) float32 noise levels of that grid, ending in 0.
        memo: encoder results, shared by every subset.
        guiders: whether the pipeline's guider components (where it has any) are on.
    """

    driver: Driver
    layout: Layout
    prompts: tuple[Prompt, ...]
    shared: Mapping[str, Any]
    samples: Mapping[str, tuple[Any, ...]]
    seeds: tuple[int, ...]
    num_steps: int
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    memo: Memo
    guiders: bool = True

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, indices: Sequence[int] | torch.Tensor | slice | int) -> Conditioning:
        """A subset, shuffle or repetition of the samples; nothing is encoded again."""
        if isinstance(indices, slice):
            indices = range(len(self))[indices]
        rows = [indices] if isinstance(indices, int) else [int(i) for i in indices]
        if not rows:
            raise RecipeError("a conditioning needs at least one sample; the indices given are empty")
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in rows),
            samples={name: tuple(values[i] for i in rows) for name, values in self.samples.items()},
            seeds=tuple(self.seeds[i] for i in rows),
        )

    def repeat(self, count: int) -> Conditioning:
        """Every sample `count` times, copies side by side: B prompts become B groups of `count`."""
        return self[[i for i in range(len(self)) for _ in range(count)]]

    def __add__(self, other: Conditioning) -> Conditioning:
        """The samples of both; they need the same pipeline, keywords and number of steps."""
        if self.driver is not other.driver or self.shared != other.shared or self.num_steps != other.num_steps:
            raise RecipeError(
                "only conditionings of one policy with the same keywords and num_steps can be concatenated; "
                f"these have {dict(self.shared)} and {dict(other.shared)}"
            )
        if self.samples.keys() != other.samples.keys():
            raise RecipeError(f"per-sample keywords differ: {sorted(self.samples)} and {sorted(other.samples)}")
        return replace(
            self,
            prompts=self.prompts + other.prompts,
            samples={name: values + other.samples[name] for name, values in self.samples.items()},
            seeds=self.seeds + other.seeds,
            memo=self.memo.joined(other.memo),
        )

    def to(self, device: torch.device | str) -> Conditioning:
        """The same conditioning with its encoded tensors on another device."""
        return replace(self, memo=self.memo.to(device))

    @property
    def unguided(self) -> Conditioning:
        """The same conditioning with classifier-free guidance off; distilled-guidance embeddings are kept."""
        return self.driver.unguided(self)

    def call(self) -> dict[str, Any]:
        """Keywords of one call of the pipeline, except what alignkit itself sets."""
        lists = {name: _as_argument(values) for name, values in self.samples.items()}
        return {"prompt": [str(p) for p in self.prompts], **self.shared, **lists}

    def generators(self) -> list[torch.Generator]:
        """Fresh generators, one per sample: every call draws the same."""
        return [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]


def _as_argument(values: tuple[Any, ...]) -> Any:
    return torch.stack(values) if isinstance(values[0], torch.Tensor) else list(values)
