"""Euphonium on the sign generator: rollouts guided by a head on noised latents, OCR as the outcome.

The quickstart with its steps in a window, as `sign_grpo_plans`. `recipe` distils the guidance into the weights beside
the policy gradient; `undistilled` only explores with it, and is judged by OCR and by what the head says of each step.

Command:   alignkit run sign_euphonium[:undistilled]        (1 CPU thread, seed 0)
Measured:  see recipes/README.md
"""

from dataclasses import replace

from alignkit.rewards.loading import load_file
from alignkit.shipped import path
from alignkit.training.euphonium import Euphonium

signs = load_file(path("recipes", "signs", "task.py"))
HEAD = "shipped:assets/signs/noisy"


def recipe() -> Euphonium:
    """Held to the base by the quickstart's KL, as distillation has no end of its own."""
    guide = {f'noise_aware(weights="{HEAD}", dimension="{name}")': w for name, w in signs.GUIDE.items()}
    guided = {"guide": guide, "guide_weight": 3.0, "guide_clip": 0.5, "distil_beta": 0.1}
    return Euphonium(**{**vars(signs.quickstart()), "plan": "window", "window": 2, "window_last": 2, **guided})


def undistilled() -> Euphonium:
    """Weaker guidance, which the weights never take over, and the change of the head's score over a step beside OCR."""
    return replace(recipe(), guide_weight=1.0, distil_beta=0.0, process_weight=0.5)
