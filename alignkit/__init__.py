"""Align diffusion and rectified-flow image and video generators with rewards."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    # policy
    "Policy": "alignkit.policy.pipeline",
    "Conditioning": "alignkit.policy.conditioning",
    "LoRA": "alignkit.policy.adapters",
    "Full": "alignkit.policy.adapters",
    # data
    "Prompt": "alignkit.types",
    "Rollouts": "alignkit.types",
    "Scores": "alignkit.types",
    "Pairs": "alignkit.types",
    # flow
    "Noise": "alignkit.flow.transition",
    "Plan": "alignkit.flow.plan",
    "Transition": "alignkit.flow.transition",
    # errors
    "AlignkitError": "alignkit.errors",
    "CheckpointError": "alignkit.errors",
    "PolicyError": "alignkit.errors",
    "RecipeError": "alignkit.errors",
    "RewardError": "alignkit.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Public names load their module on first use, so that `import alignkit` stays fast."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'alignkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
