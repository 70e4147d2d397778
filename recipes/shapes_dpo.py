"""Flow-DPO on the generator of moving shapes, from pairs that the video reward ranked; with both time weights.

`recipe`, `derived`, and the recipes shapes_rwr and shapes_sft learn from the same 768 samples of the 96 training
prompts, with equal numbers of updates and of samples per update. The pairs come from

           alignkit pairs video_quickstart --samples 8 --steps 8 --batch 64 --out runs/shapes_pairs

Command:   alignkit run shapes_dpo[:derived]        (1 CPU thread, seed 0)
Measured:  see recipes/README.md
"""

from dataclasses import replace

from alignkit.rewards.loading import load_file
from alignkit.shipped import path
from alignkit.training.dpo import DPO

shapes = load_file(path("recipes", "shapes", "task.py"))


def recipe() -> DPO:
    """The constant weight. 32 pairs a round: 64 samples."""
    return DPO(
        **shapes.task(prompts=None, data="runs/shapes_pairs/pairs.jsonl", prompts_per_step=32),
        **shapes.OFFLINE,
        beta=100.0,
    )


def derived() -> DPO:
    """The weight (1 - sigma)^2 that follows from the derivation; a third on average, hence three times the beta."""
    return replace(recipe(), time_weight="derived", beta=300.0)
