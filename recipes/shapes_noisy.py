"""A noise-aware reward of moving shapes: it judges noised latents in look, motion and what was asked, for guidance.

Command:   alignkit run shapes_noisy[:clean|:control]
Measured:  not yet run
"""

from dataclasses import replace

from alignkit.training.reward_model import RewardModel

SHAPES = "shipped:recipes/shapes/noisy.py"


def recipe() -> RewardModel:
    """Both clips of a pair get the same noise at the same level. The head holds the generator's first two blocks, so a
    new generator needs a new head."""
    return RewardModel(
        model=f"{SHAPES}:scorer",
        data=f"{SHAPES}:Contests",
        loss="bradley_terry_ties",
        noise=(0.0, 0.95),
        batch=24,
        steps=1200,
        lr=1e-3,
        warmup=50,
        lr_schedule="cosine",
        ema_decay=0.99,
        eval_every=400,
    )


def clean() -> RewardModel:
    """Clean latents only: the ablation that guides worse than nothing in the paper (VideoAlign, Table 5)."""
    return replace(
        recipe(), model=f"{SHAPES}:scorer(noise=None)", data=f"{SHAPES}:Contests(noised=False)", noise=None
    )


def control() -> RewardModel:
    """Pairs get the labels of other pairs."""
    return replace(recipe(), data=f"{SHAPES}:Contests(shuffled=True)", steps=400)
