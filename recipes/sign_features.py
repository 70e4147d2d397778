"""Features of signs without labels: a tiny DINOv2, trained by self-distillation to see shapes whatever their colour.

Command:   alignkit run sign_features        (seed 0; the result is in runs/sign_features/model)
Measured:  see recipes/signs/README.md
"""

from alignkit.training.reward_model import RewardModel

SIGNS = "shipped:recipes/signs/features.py"


def recipe() -> RewardModel:
    return RewardModel(
        model=f"{SIGNS}:scorer",
        data=f"{SIGNS}:UnlabelledSigns",
        loss="self_distillation",
        batch=48,
        steps=600,
        lr=1e-3,
        warmup=30,
        lr_schedule="cosine",
        weight_decay=0.04,
        max_grad_norm=3.0,
        eval_every=100,
    )
