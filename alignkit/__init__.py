"""Align diffusion and rectified-flow image and video generators with rewards.

Public names load their module on first use, so that `import alignkit` stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignkit.data.prompts import load_prompts
    from alignkit.errors import AlignkitError, CheckpointError, DataError, PolicyError, RecipeError, RewardError
    from alignkit.flow.plan import Plan
    from alignkit.flow.transition import Noise, Transition
    from alignkit.inference.guide import Guided, guide
    from alignkit.policy.adapters import Full, LoRA
    from alignkit.policy.conditioning import Conditioning
    from alignkit.policy.memory import Decode
    from alignkit.policy.pipeline import Policy
    from alignkit.training.adversary import Critic
    from alignkit.training.awm import AWM
    from alignkit.training.crd import CRD
    from alignkit.training.dgpo import DGPO
    from alignkit.training.dpo import DPO
    from alignkit.training.euphonium import Euphonium
    from alignkit.training.follow import Follow
    from alignkit.training.grpo import GRPO
    from alignkit.training.instruct_video import InstructVideo
    from alignkit.training.kto import KTO
    from alignkit.training.matching import Levels
    from alignkit.training.nft import NFT
    from alignkit.training.regional import Regional
    from alignkit.training.rwr import ADRPO, ORW, RWR, SFT
    from alignkit.training.value_gradient import ValueGradient
    from alignkit.types import Pairs, Prompt, Rollouts, Scores

__version__ = "0.1.0"

__all__ = [
    # policy
    "Policy",
    "Conditioning",
    "LoRA",
    "Full",
    "Decode",
    # sampling
    "guide",
    "Guided",
    # training
    "GRPO",
    "Euphonium",
    "DPO",
    "KTO",
    "DGPO",
    "SFT",
    "RWR",
    "ORW",
    "ADRPO",
    "NFT",
    "AWM",
    "CRD",
    "Regional",
    "ValueGradient",
    "InstructVideo",
    "Critic",
    "Follow",
    "Levels",
    # data
    "Prompt",
    "Rollouts",
    "Scores",
    "Pairs",
    "load_prompts",
    # flow
    "Noise",
    "Plan",
    "Transition",
    # errors
    "AlignkitError",
    "CheckpointError",
    "DataError",
    "PolicyError",
    "RecipeError",
    "RewardError",
]

_HOMES = {
    "alignkit.policy": ("Policy", "Conditioning", "LoRA", "Full"),
    "alignkit.policy.memory": ("Decode",),
    "alignkit.inference.guide": ("guide", "Guided"),
    "alignkit.training.grpo": ("GRPO",),
    "alignkit.training.euphonium": ("Euphonium",),
    "alignkit.training.dpo": ("DPO",),
    "alignkit.training.kto": ("KTO",),
    "alignkit.training.dgpo": ("DGPO",),
    "alignkit.training.rwr": ("SFT", "RWR", "ORW", "ADRPO"),
    "alignkit.training.nft": ("NFT",),
    "alignkit.training.awm": ("AWM",),
    "alignkit.training.crd": ("CRD",),
    "alignkit.training.regional": ("Regional",),
    "alignkit.training.value_gradient": ("ValueGradient",),
    "alignkit.training.instruct_video": ("InstructVideo",),
    "alignkit.training.adversary": ("Critic",),
    "alignkit.training.follow": ("Follow",),
    "alignkit.training.matching": ("Levels",),
    "alignkit.types": ("Prompt", "Rollouts", "Scores", "Pairs"),
    "alignkit.data.prompts": ("load_prompts",),
    "alignkit.flow.transition": ("Noise", "Transition"),
    "alignkit.flow.plan": ("Plan",),
    "alignkit.errors": tuple(name for name in __all__ if name.endswith("Error")),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'alignkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
