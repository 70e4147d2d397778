"""Flow-GRPO on the generator of moving shapes: they learn to move as the prompt says, steadily.

The reward is a tiny VideoReward that was trained on pairs of clips (`shapes_reward`). The judge is a tracker of
centroids and colours that no training sees.

Command:   alignkit run video_quickstart        (1 CPU thread, seed 0)
Measured:  336 s of training, 351 s in all; 32 held-out prompts: video_reward -0.605 -> 2.186. Never trained on: tracker
           0.115 -> 0.310, direction 0.344 -> 0.875, steadiness 0.688 -> 0.882, identity 0.469 -> 0.497; with four
           seeds, tracker 0.107 -> 0.337; more in recipes/README.md
"""

from alignkit.flow.transition import Noise
from alignkit.policy import LoRA
from alignkit.rewards.loading import load_file
from alignkit.shipped import path
from alignkit.training.grpo import GRPO

shapes = load_file(path("recipes", "shapes", "task.py"))


def recipe() -> GRPO:
    return GRPO(
        model=shapes.GENERATOR,
        prompts="shipped:assets/shapes/train.txt",
        eval_prompts="shipped:assets/shapes/held_out.txt",
        rewards={shapes.REWARD: 1.0},
        judges=shapes.JUDGES,
        call={**shapes.CALL, "guidance_scale": 1.0},
        guidance_baseline={"guidance_scale": 3.0},
        train=LoRA(rank=16, alpha=32.0),
        num_steps=6,
        eval_steps=8,
        noise=Noise("flow_sde", 0.7),
        plan="random",
        window=2,
        window_last=2,  # where a shape goes is decided in the first half of the steps
        shared_noise=True,  # else most of what a group differs in is its first noise, which no step is to blame for
        steps=130,
        time_limit=400.0,
        prompts_per_step=8,
        group_size=8,
        updates=4,
        lr=2e-3,
        warmup=3,
        lr_schedule="linear",
        clip=1e-3,
        kl_beta=0.02,
        ema_decay=0.8,
        eval_every=30,
        sample_prompts=8,
        diversity_samples=4,
    )
