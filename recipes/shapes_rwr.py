"""Flow-RWR on the generator of moving shapes, from the samples that shapes_dpo's pairs are made of.

Command:   alignkit run shapes_rwr        (1 CPU thread, seed 0; first make the pairs as shapes_dpo says)
Measured:  see recipes/README.md
"""

from alignkit.rewards.loading import load_file
from alignkit.shipped import path
from alignkit.training.rwr import RWR

shapes = load_file(path("recipes", "shapes", "task.py"))


def recipe() -> RWR:
    """Every prompt's eight samples, weighted by exp((reward - mean) / temperature) with mean 1."""
    return RWR(
        **shapes.task(prompts=None, data="runs/shapes_pairs/samples.jsonl"),
        **shapes.OFFLINE,
        temperature=1.0,
    )
