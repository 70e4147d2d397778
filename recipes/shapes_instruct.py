"""InstructVideo on the moving shapes: an image reward on frames, which a still shape in the middle satisfies best.

`recipe` judges one random frame of each of four segments, less the farther from the centre (SegVR and TAR);
`dense` judges every frame; `full_start` is `recipe` from pure noise. The judge is the tracker, above all its
`speed`: whether anything still moves.

Command:   alignkit run shapes_instruct        (also shapes_instruct:dense, shapes_instruct:full_start)
Measured:  42 s, 44 s and 36 s in all (1 CPU thread, seed 0). 32 held-out prompts, the reward of all frames and speed:
           0.131 -> 0.230 and 1.01 -> 0.91; `:dense` 0.261 and 0.76; `:full_start` 0.233 and 0.91. With `--steps 20
           --eval-every 2`, at equal reward (0.29), 0.87 against `:dense` 0.70; more in recipes/README.md. Forms are
           lost from round 12 on.
"""

from typing import Any

from alignkit.rewards.loading import load_file
from alignkit.shipped import path
from alignkit.training.instruct_video import InstructVideo

shapes = load_file(path("recipes", "shapes", "task.py"))
CENTRED = "shipped:recipes/shapes/frame_reward.py:Centred"
SPARSE = f'segmental(reward="{CENTRED}", segments=4, normalised=False)'
DENSE = f'per_frame_mean(reward="{CENTRED}")'


def recipe() -> InstructVideo:
    return editing(SPARSE)


def dense() -> InstructVideo:
    return editing(DENSE)


def full_start() -> InstructVideo:
    return editing(SPARSE, start=1.0)


def editing(reward: str, start: float = 0.6) -> InstructVideo:
    """Both frame rewards are measured before and after, whichever is trained on."""
    fields: dict[str, Any] = {
        "rewards": {reward: 1.0},
        "judges": (*shapes.JUDGES, DENSE if reward == SPARSE else SPARSE),
        "num_steps": 10,
        "eval_steps": 10,
        "prompts_per_step": 8,
        "group_size": 1,
        "updates": 1,
        "train_guidance": "off",
        "eval_every": 10,
        "diversity_samples": 4,
    }
    return InstructVideo(**shapes.task(**fields), start=start, steps=12, lr=1e-3, warmup=2, ema_decay=0.8)
