"""Velocity-gradient matching on the sign generator: noisy reward guidance becomes part of the weights.

The head on noised latents says where legible and rightly coloured signs are; OCR is only measured.

Command:   alignkit run sign_value_gradient        (1 CPU thread, seed 0)
Measured:  see recipes/README.md
"""

from alignkit.rewards.loading import load_file
from alignkit.shipped import path
from alignkit.training.value_gradient import ValueGradient

signs = load_file(path("recipes", "signs", "task.py"))
HEAD = "shipped:assets/signs/noisy"


def recipe() -> ValueGradient:
    return ValueGradient(
        **signs.task(),
        guide={f'noise_aware(weights="{HEAD}", dimension="{name}")': w for name, w in signs.GUIDE.items()},
        guide_weight=3.0,
        guide_clip=1.0,
        steps=40,
        draws=4,
        lr=2e-3,
        warmup=3,
        lr_schedule="linear",
        ema_decay=0.8,
    )
