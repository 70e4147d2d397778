"""Every method on the tiny SD 3 of the zoo, as small as it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignkit.flow.transition import Noise
from alignkit.policy import LoRA
from alignkit.training.awm import AWM
from alignkit.training.benchmark_methods import Faint, Halves
from alignkit.training.crd import CRD
from alignkit.training.dgpo import DGPO
from alignkit.training.dpo import DPO
from alignkit.training.euphonium import Euphonium
from alignkit.training.follow import Follow
from alignkit.training.grpo import GRPO
from alignkit.training.instruct_video import InstructVideo
from alignkit.training.kto import KTO
from alignkit.training.nft import NFT
from alignkit.training.recipe import Recipe
from alignkit.training.regional import Regional
from alignkit.training.rwr import ADRPO, ORW, RWR, SFT
from alignkit.training.value_gradient import ValueGradient

CALL = {"height": 32, "width": 32, "guidance_scale": 1.0, "max_sequence_length": 8}


GRPO_SMALL: dict[str, Any] = {"noise": Noise("cps", 0.7), "plan": "explicit", "plan_steps": (0, 2)}

METHODS: dict[str, tuple[type[Recipe], dict[str, Any]]] = {
    "GRPO": (GRPO, GRPO_SMALL),
    "GRPO, KL": (GRPO, {**GRPO_SMALL, "kl_beta": 0.1}),
    "GRPO, early KL": (GRPO, {**GRPO_SMALL, "kl_beta": 0.1, "kl_steps": 1}),
    "GRPO, velocity": (GRPO, {**GRPO_SMALL, "velocity_beta": 0.1}),
    "GRPO, shared noise": (GRPO, {**GRPO_SMALL, "plan_steps": (1, 2), "shared_noise": True}),
    "GRPO, tree": (GRPO, {**GRPO_SMALL, "plan_steps": (1,), "branch_width": 4}),
    "Euphonium": (Euphonium, {**GRPO_SMALL, "guide": {Faint(): 1.0}, "process_weight": 0.5, "distil_beta": 0.1}),
    "Euphonium, KL": (Euphonium, {**GRPO_SMALL, "guide": {Faint(): 1.0}, "kl_beta": 0.1}),
    "DPO": (DPO, {}),
    "KTO": (KTO, {}),
    "DGPO": (DGPO, {}),
    "SFT": (SFT, {}),
    "RWR": (RWR, {}),
    "RWR, anchors": (RWR, {"velocity_beta": 0.1, "data_beta": 0.5, "data_samples": 3}),
    "ORW": (ORW, {}),
    "ADRPO": (ADRPO, {}),
    "NFT": (NFT, {}),
    "NFT, three draws": (NFT, {"draws": 3, "velocity_beta": 0.0}),
    "AWM": (AWM, {}),
    "AWM, two updates": (AWM, {"updates": 2, "old": Follow()}),
    "CRD": (CRD, {}),
    "Regional": (Regional, {"rewards": {Halves(): 1.0}}),
    "ValueGradient": (ValueGradient, {"guide": {Faint(): 1.0}}),
    "InstructVideo": (InstructVideo, {"start": 0.75, "velocity_beta": 0.1}),
    "InstructVideo, from noise": (InstructVideo, {"start": 1.0}),
}


def recipe_of(method: str, place: Path, **fields: Any) -> Recipe:
    """Two prompts of four samples, four steps; `place` holds a tiny `model` and `prompts.txt`."""
    kind, own = METHODS[method]
    shared: dict[str, Any] = {
        "model": str(place / "model"),
        "prompts": str(place / "prompts.txt"),
        "rewards": {"brightness": 1.0},
        "call": CALL,
        "num_steps": 4,
        "steps": 2,
        "prompts_per_step": 2,
        "group_size": 4,
        "train": LoRA(rank=2, alpha=4.0),
        "eval_every": 0,
    }
    return kind(**{**shared, **own, **fields})
