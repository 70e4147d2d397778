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
