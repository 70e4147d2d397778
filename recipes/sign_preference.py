"""A preference model for signs: a tiny open_clip dual encoder, trained on which sign a prompt asks for.

Command:   alignkit run sign_preference        (seed 0; the result is in runs/sign_preference/model)
Measured:  see recipes/signs/README.md; `alignkit run sign_preference:control` is the same with shuffled labels
"""

from dataclasses import replace

from alignkit.training.reward_model import RewardModel

SIGNS = "shipped:recipes/signs/preference.py"


def recipe() -> RewardModel:
    return RewardModel(
        model=f"{SIGNS}:scorer",
        data=f"{SIGNS}:Contests",
        loss=f"{SIGNS}:loss",
        batch=12,
        steps=2000,
        lr=2e-3,
        warmup=50,
        lr_schedule="cosine",
        ema_decay=0.99,
        eval_every=250,
    )


def control() -> RewardModel:
    """Prompts, what signs show, and which is preferred, are drawn at random."""
    return replace(recipe(), data=f"{SIGNS}:Contests(shuffled=True)")
