"""The sign generator's own text encoder learns to answer questions about signs, and goes on encoding prompts.

Command:   alignkit run sign_judge        (about 45 minutes on one thread of a busy machine, seed 0; the result,
           runs/sign_judge/model, goes into the generator's folder)
Measured:  120 held-out words: right word above wrong ones (AUC) 0.51 -> 0.99, one letter different answered "no" 0.875,
           colour 0.98; what prompts are encoded to changes by 0.0004 of its mean square. See recipes/signs/README.md
"""

from alignkit.training.reward_model import RewardModel

SIGNS = "shipped:recipes/signs/judge.py"


def recipe() -> RewardModel:
    return RewardModel(
        model=f"{SIGNS}:judge",
        data=f"{SIGNS}:Questions",
        loss=f"{SIGNS}:loss",
        batch=24,
        steps=2400,
        lr=1.5e-3,
        warmup=100,
        lr_schedule="cosine",
        eval_every=400,
        checkpoint_seconds=60.0,
    )
