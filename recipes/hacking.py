"""Reward hacking in two minutes: the quickstart without its colour reward and without KL.

Spelling rises as before, and what nobody rewards drifts: the report shows OCR up and colour down, in red.

Command:   alignkit run hacking        (about 4 minutes on 2 CPU cores; seed 0)
Measured:  see recipes/README.md
"""

from dataclasses import replace

from alignkit.shipped import path
from alignkit.training.grpo import GRPO
from alignkit.training.recipe_files import Source, load


def recipe() -> GRPO:
    careful = load(Source(path("recipes", "quickstart.py")))
    assert isinstance(careful, GRPO)
    return replace(
        careful,
        rewards={"ocr": 1.0},
        judges=("sign_color", "tesseract"),
        kl_beta=0.0,
        lr_schedule="constant",
        ema_decay=None,
        steps=24,
    )
