"""The quickstart with a learnt reward: a preference model of signs in place of an OCR engine and a colour reader.

The judge `serif` says which font is drawn; nobody asks for one, and half and half is what the generator began with.

Command:   alignkit run sign_preference_grpo        (about 4 minutes on 2 CPU cores; seed 0)
Measured:  see recipes/README.md
"""

from dataclasses import replace

from alignkit.shipped import path
from alignkit.training.grpo import GRPO
from alignkit.training.recipe_files import Source, load

PREFERENCE = 'open_clip(model="shipped:assets/signs/preference", name="sign_preference")'
SERIF = f"{path('recipes', 'signs', 'fonts.py')}:serif"


def recipe() -> GRPO:
    quickstart = load(Source(path("recipes", "quickstart.py")))
    assert isinstance(quickstart, GRPO)
    return replace(quickstart, rewards={PREFERENCE: 1.0}, judges=("ocr", "tesseract", "sign_color", SERIF))
