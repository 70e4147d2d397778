"""Memory: activations of a pipeline's modules that are computed again at backward instead of kept."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from alignkit.errors import RecipeError
from alignkit.policy import Policy
from alignkit.policy.adapters import denoisers
from alignkit.policy.memory import checkpointing, components
from alignkit.policy.standin import class_attribute

DECODERS = "diffusers.models.autoencoders"


def recomputable(policy: Any, denoiser: bool) -> dict[str, nn.Module]:
    """The decoders of a policy, and its denoisers if asked for, whose classes can checkpoint; by component name."""
    if not isinstance(policy, Policy):
        return {}
    found = {n: m for n, m in components(policy.pipe).items() if type(m).__module__.startswith(DECODERS)}
    found |= denoisers(policy.pipe) if denoiser else {}
    return {n: m for n, m in found.items() if class_attribute(type(m), "_supports_gradient_checkpointing")}


def recomputing(policy: Any, denoiser: bool) -> AbstractContextManager[None]:
    """Context: `recomputable` modules compute their activations again at backward.

    Raises:
        RecipeError: there are none.
    """
    able = recomputable(policy, denoiser)
    if not able:
        parts = "the decoder and the denoiser" if denoiser else "the decoder"
        raise RecipeError(f"checkpointing=True, and {parts} cannot checkpoint; set gradient_batch=1 instead")
    return checkpointing(able)
