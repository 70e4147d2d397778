"""Reward guidance on the generator of moving shapes, untrained, with the weights of three dimensions chosen freely.

One head on noised latents (`shapes_noisy`) judges look (VQ), motion (MQ) and agreement with the prompt (TA). `recipe`
sets guidance by it against best of n, `weights` sweeps its three weights as VideoAlign's Table 5 does. The tracker
steers nothing.

Command:   alignkit run shapes_guidance[:weights]        (CPU, seeds 0 to 2)
Measured:  see recipes/README.md
"""

from dataclasses import replace

from alignkit.inference.comparison import Arm, Comparison
from alignkit.rewards.loading import load_file
from alignkit.shipped import path

shapes = load_file(path("recipes", "shapes", "task.py"))

HEAD = 'noise_aware(weights="shipped:assets/shapes/noisy", dimension="{}")'
VQ, MQ, TA = (HEAD.format(dimension) for dimension in ("VQ", "MQ", "TA"))
CLEAN_HEAD = (
    'shipped:recipes/worlds/ablation.py:CleanHead(weights="shipped:assets/shapes/noisy_clean", '
    'dimension="{0}", name="clean_{0}")'
)
NRG = "nrg(clip=1.0)"


def recipe() -> Comparison:
    heads = {VQ: 1.0, MQ: 1.0, TA: 1.0}
    clean = {CLEAN_HEAD.format(dimension): 1.0 for dimension in ("VQ", "MQ", "TA")}
    return Comparison(
        model=shapes.GENERATOR,
        prompts="shipped:assets/shapes/held_out.txt",
        rewards={shapes.REWARD: 1.0},
        judges=(shapes.REWARD, *shapes.JUDGES, VQ, MQ, TA),
        shown=("tracker", "direction", "smoothness", "steadiness", "VQ", "MQ", "TA"),
        arms={
            "unguided": Arm(),
            "best of 4": Arm("best_of_n", budget=4.0),
            "NRG": Arm(NRG, heads),
            "NRG, best of 4": Arm(NRG, heads, budget=4.0),
            "NRG, clean heads": Arm(NRG, clean),
        },
        call={**shapes.CALL, "guidance_scale": 1.0},
        num_steps=8,
        batch=32,
    )


def weights() -> Comparison:
    """The paper's Table 5 in small."""
    shares = ((0, 0, 1), (0.1, 0.1, 0.8), (0.1, 0.1, 0.6), (0.5, 0.5, 0), (1, 0, 0), (0, 1, 0))
    arms = {":".join(f"{s:g}" for s in w): Arm(NRG, dict(zip((VQ, MQ, TA), w, strict=True))) for w in shares}
    return replace(recipe(), arms={"unguided": Arm(), **arms})
