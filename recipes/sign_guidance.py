"""Reward guidance on the sign generator, untrained: what each method makes of the same denoiser calls.

Contenders share prompts (held-out words) and noise. OCR steers those that take any reward; a preference model those
that follow gradients of pictures; a head on noised latents steers `nrg`. Tesseract steers none of them. Strengths were
chosen on 22 training words.
`sign_guidance:weights` sweeps the weights of legibility and colour in one head.

Command:   alignkit run sign_guidance[:weights]        (CPU, seeds 0 to 2)
Measured:  see recipes/README.md
"""

from dataclasses import replace

from alignkit.inference.comparison import Arm, Comparison

PREFERENCE = 'open_clip(model="shipped:assets/signs/preference", name="sign_preference")'
LEGIBILITY = 'noise_aware(weights="shipped:assets/signs/noisy", dimension="legibility")'
COLOUR = 'noise_aware(weights="shipped:assets/signs/noisy", dimension="colour")'
CLEAN = (
    'shipped:recipes/worlds/ablation.py:CleanHead(weights="shipped:assets/signs/noisy_clean", '
    'dimension="legibility", name="clean_legibility")'
)
NRG = "nrg(clip=1.0)"
DPS = "dps(weight=200.0)"


def recipe() -> Comparison:
    heads, preferred = {LEGIBILITY: 1.0, COLOUR: 0.5}, {PREFERENCE: 1.0}
    return Comparison(
        model="shipped:assets/signs/generator",
        prompts="shipped:assets/signs/held_out.txt",
        rewards={"ocr": 1.0},
        judges=("ocr", "tesseract", "sign_color", PREFERENCE, LEGIBILITY, COLOUR),
        exact=("ocr", "tesseract"),
        shown=("ocr", "tesseract", "tesseract_exact", "legibility"),
        arms={
            "unguided": Arm(),
            "unguided, 4 x the steps": Arm(num_steps=32),
            "best of 4, OCR": Arm("best_of_n", budget=4.0),
            "best of 4, preference": Arm("best_of_n", preferred, budget=4.0),
            "search, OCR": Arm("search", budget=4.0),
            "FK, OCR": Arm("fk(noise=0.3)", budget=4.0),
            "DAS, preference": Arm("das(strength=60.0, noise=0.4)", preferred, budget=4.0),
            "DPS, preference": Arm(DPS, preferred),
            "DPS, preference, best of 4": Arm(DPS, preferred, budget=4.0),
            "NRG": Arm(NRG, heads),
            "NRG, best of 4": Arm(NRG, heads, budget=4.0),
            "NRG, clean head": Arm(NRG, {CLEAN: 1.0}),
        },
        call={"height": 24, "width": 64, "true_cfg_scale": 1.0},
        num_steps=8,
        batch=32,
    )


def weights() -> Comparison:
    """The paper's Table 5 in small: two dimensions of one head, weighted from one end to the other."""
    shares = (1.0, 0.75, 0.5, 0.25, 0.0)
    arms = {f"{s:g} : {1 - s:g}": Arm(NRG, {LEGIBILITY: s, COLOUR: 1 - s}) for s in shares}
    return replace(
        recipe(),
        arms={"unguided": Arm(), **arms},
        shown=("tesseract_exact", "legibility", "colour"),
        frontier=("colour", "tesseract_exact"),
    )
