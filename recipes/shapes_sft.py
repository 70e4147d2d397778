"""Fine-tuning on winners: the best of each prompt's eight samples, from the file of shapes_dpo's pairs.

Command:   alignkit run shapes_sft        (1 CPU thread, seed 0; first make the pairs as shapes_dpo says)
Measured:  see recipes/README.md
"""

from alignkit.rewards.loading import load_file
from alignkit.shipped import path
from alignkit.training.rwr import SFT

shapes = load_file(path("recipes", "shapes", "task.py"))


def recipe() -> SFT:
    """64 winners a round."""
    return SFT(
        **shapes.task(prompts=None, data="runs/shapes_pairs/samples.jsonl", prompts_per_step=64),
        **shapes.OFFLINE,
    )
