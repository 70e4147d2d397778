"""InstructVideo on the moving shapes: an image reward on frames, which a still shape in the middle satisfies best.

`recipe` judges one random frame of each of four segments, less the farther from the centre (SegVR and TAR); `dense`
judges every frame; `full_start` is `recipe` from pure noise. The judge is the tracker, above all its `speed`: whether
anything still moves.

Command:   alignkit run shapes_instruct        (also shapes_instruct:dense, shapes_instruct:full_start)
Measured:  see recipes/README.md
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
    return InstructVideo(**shapes.task(**fields), start=start, steps=30, lr=1e-3, warmup=3, ema_decay=0.8)
