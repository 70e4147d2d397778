"""Flow-GRPO on the shipped sign generator: it learns to spell, from nothing but what an OCR engine reads.

Command:   alignkit run quickstart        (about 4 minutes on 2 CPU cores, at most 2 of them training; seed 0)
Measured:  see recipes/README.md
"""

from alignkit.flow.transition import Noise
from alignkit.policy import LoRA
from alignkit.training.grpo import GRPO


def recipe() -> GRPO:
    return GRPO(
        model="shipped:assets/signs/generator",
        prompts="shipped:assets/signs/train.txt",
        eval_prompts="shipped:assets/signs/held_out.txt",
        rewards={"ocr": 1.0, "sign_color": 0.5},
        judges=("tesseract",),
        call={"height": 24, "width": 64, "true_cfg_scale": 1.0},
        guidance_baseline={"true_cfg_scale": 4.0, "negative_prompt": " "},
        train=LoRA(rank=16, alpha=32.0),
        num_steps=6,
        eval_steps=8,
        noise=Noise("flow_sde", 0.7),
        plan="random",
        window=2,
        window_last=2,  # which letter is drawn is decided in the first half of the steps
        steps=40,
        time_limit=116.0,
        prompts_per_step=8,
        group_size=8,
        updates=4,
        lr=3e-3,
        warmup=3,
        lr_schedule="linear",
        clip=1e-3,
        kl_beta=0.02,
        ema_decay=0.8,
        eval_every=10,
        sample_prompts=12,
    )
