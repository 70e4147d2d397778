"""Euphonium on the sign generator: rollouts guided by a head on noised latents, OCR as the outcome.

The quickstart with its steps in a window, as `sign_grpo_plans`, and a fifth of its rounds: every round distils the
guidance on top of what was distilled before, which has no end. `longer` shows where that leads.

Command:   alignkit run sign_euphonium[:longer]        (1 CPU thread, seed 0)
Measured:  see recipes/README.md
"""

from dataclasses import replace

from alignkit.rewards.loading import load_file
from alignkit.shipped import path
from alignkit.training.euphonium import Euphonium

signs = load_file(path("recipes", "signs", "task.py"))
HEAD = "shipped:assets/signs/noisy"


def recipe() -> Euphonium:
    """The change is at most a quarter of the velocity; OCR, and what the head says of each step, judge it."""
    guide = {f'noise_aware(weights="{HEAD}", dimension="{name}")': w for name, w in signs.GUIDE.items()}
    guided = {"guide": guide, "guide_weight": 1.0, "guide_clip": 0.25, "process_weight": 0.5, "distil_beta": 0.05}
    window = {"plan": "window", "window": 2, "window_last": 2, "steps": 8}
    return Euphonium(**{**vars(signs.quickstart()), **window, **guided})


def longer() -> Euphonium:
    """20 rounds."""
    return replace(recipe(), steps=20)
