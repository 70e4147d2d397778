"""A video reward of three dimensions for moving shapes: a tiny VideoReward, trained on pairs of clips with ties.

Command:   alignkit run shapes_reward:base     a Qwen2-VL learns to say what it sees; 20 minutes, goes into
                                               assets/shapes/reward/base
           alignkit run shapes_reward          which of two clips people prefer, from that base; 4 minutes
           (one thread of a machine with 2 cores that others used too, seed 0)
Measured:  256 pairs of held-out prompts, without ties / with ties at the best threshold, before -> after:
           VQ 0.53 -> 0.96 / 0.40 -> 0.76, MQ 0.52 -> 0.97 / 0.39 -> 0.92, TA 0.46 -> 0.93 / 0.38 -> 0.75.
           The clip as asked beats one of another colour, without motion, that stands still, jerks, flickers, is grainy
           or has low contrast 1.00, moves another way 0.97, is blurred 0.94, of another shape 0.84.
           `:bt` ends at VQ 0.85 / 0.61, MQ 0.96 / 0.85, TA 0.92 / 0.74; `:control` at 0.50 / 0.36, 0.46 / 0.36,
           0.47 / 0.37.
"""

from dataclasses import replace

from alignkit.training.reward_model import RewardModel

SHAPES = "shipped:recipes/shapes/video_judge.py"
SPEAKER = "shipped:recipes/shapes/speaker.py"


def recipe() -> RewardModel:
    """Labels better, worse, tie and no answer, in each dimension; 5 % of them are wrong."""
    return RewardModel(
        model=f"{SHAPES}:scorer",
        data=f"{SHAPES}:Contests",
        loss="bradley_terry_ties",
        batch=16,
        steps=1500,
        lr=1e-3,
        warmup=30,
        lr_schedule="cosine",
        ema_decay=0.98,
        eval_every=125,
    )


def bt() -> RewardModel:
    """Bradley and Terry without ties: pairs that tie in a dimension teach nothing of it."""
    return replace(recipe(), loss="bradley_terry_dimensions")


def control() -> RewardModel:
    """Pairs get the labels of other pairs."""
    return replace(recipe(), data=f"{SHAPES}:Contests(shuffled=True)", steps=200)


def base() -> RewardModel:
    """What VideoReward starts from: a model that knows what it sees and can be asked about it."""
    return RewardModel(
        model=f"{SPEAKER}:speaker",
        data=f"{SPEAKER}:Descriptions",
        loss=f"{SPEAKER}:answers",
        batch=32,
        steps=4000,
        lr=1.5e-3,
        warmup=50,
        lr_schedule="cosine",
        ema_decay=0.99,
        eval_every=100,
    )
