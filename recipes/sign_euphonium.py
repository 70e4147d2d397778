"""Euphonium on the sign generator: rollouts guided by a head on noised latents, OCR as the outcome.

The quickstart with its steps in a window, as `sign_grpo_plans`, and half its rounds. `recipe` guides weakly and distils
a little of it; `strong` guides as `sign_value_gradient` does and shows that distilling on top of what was distilled
before has no end.

Command:   alignkit run sign_euphonium[:strong]        (1 CPU thread, seed 0)
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
    weak = {"guide": guide, "guide_weight": 1.0, "guide_clip": 0.25, "process_weight": 0.5, "distil_beta": 0.05}
    window = {"plan": "window", "window": 2, "window_last": 2, "steps": 20}
    return Euphonium(**{**vars(signs.quickstart()), **window, **weak})


def strong() -> Euphonium:
    """Twice the change and the distillation, for twice as long."""
    return replace(recipe(), guide_weight=3.0, guide_clip=0.5, process_weight=0.0, distil_beta=0.1, steps=40)
