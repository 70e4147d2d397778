"""Signs in the style of a folder: similarity to serif signs, by features that were learnt without labels.

Features that know neither words nor colours can be pleased by letters that nobody asked for, so the preference model
has a say too; the variant `alone` leaves it out and shows what happens then.

Command:   alignkit run sign_style_grpo        (about 4 minutes on 2 CPU cores; seed 0)
           alignkit run sign_style_grpo:alone
Measured:  see recipes/README.md
"""

from dataclasses import replace

from alignkit.shipped import path
from alignkit.training.grpo import GRPO
from alignkit.training.recipe_files import Source, load

STYLE = (
    'dino_style(references="shipped:assets/signs/style", weights="shipped:assets/signs/features", '
    'use="patches", match="best", pool="top_k", k=4)'
)
PREFERENCE = 'open_clip(model="shipped:assets/signs/preference", name="sign_preference")'
SERIF = "shipped:recipes/signs/fonts.py:serif"


def recipe() -> GRPO:
    """Style and words; the weights make the two spread about equally within a prompt's samples."""
    quickstart = load(Source(path("recipes", "quickstart.py")))
    assert isinstance(quickstart, GRPO)
    judges = (SERIF, "ocr", "tesseract", "sign_color")
    return replace(quickstart, rewards={STYLE: 3.0, PREFERENCE: 1.0}, judges=judges)


def alone() -> GRPO:
    """Nothing but style."""
    return replace(recipe(), rewards={STYLE: 1.0})
