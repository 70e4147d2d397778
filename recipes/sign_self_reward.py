"""Flow-GRPO on the sign generator with no reward but its own text encoder's answers about what it drew.

Command:   alignkit run sign_self_reward        (2 CPU cores, busy; 175 s training, 250 s with all assessments; seed 0)
Measured:  120 held-out words: own reward 0.653 -> 0.912; never trained on: OCR exact 0.342 -> 0.875, Tesseract exact
           0.350 -> 0.842, colour 1.000 -> 1.000; guidance alone: OCR exact 0.625. Not unsupervised: the encoder was
           taught on rendered signs whose words were known (`sign_judge`).
           What it lets through: of 480 fresh pictures the share that it confirms and RapidOCR does not fell from 0.067
           to 0.042, but of those that RapidOCR reads otherwise it now confirms 0.43 (before 0.11), such as N for M.
"""

from dataclasses import replace

from alignkit.rewards.loading import with_options
from alignkit.shipped import path
from alignkit.training.grpo import GRPO
from alignkit.training.recipe_files import Source, load

COLOUR, WORD = "is the sign {colour}?", 'does the sign say "{word}"?'
PATTERN = 'an? (?P<colour>[a-z]+) sign that says "(?P<word>[A-Z]+)"'


def recipe() -> GRPO:
    quickstart = load(Source(path("recipes", "quickstart.py")))
    assert isinstance(quickstart, GRPO)
    own = with_options("self_reward", {"questions": (COLOUR, WORD), "pattern": PATTERN})
    return replace(quickstart, rewards={own: 1.0}, judges=("ocr", "tesseract", "sign_color"), time_limit=None)


def control() -> GRPO:
    """Only the colour is asked about, which the generator has right already. Its own reward rises (0.969 -> 0.981) and
    what nobody asks about is lost: OCR exact 0.342 -> 0.108. 40 rounds, seed 0."""
    return replace(recipe(), rewards={with_options("self_reward", {"questions": (COLOUR,), "pattern": PATTERN}): 1.0})


def longer() -> GRPO:
    """Two and a half times as long. Own reward 0.921, OCR exact 0.867, Tesseract exact 0.800 (0.912, 0.875, 0.842 after
    40 rounds), diversity 0.159 -> 0.105 (40 rounds: 0.150); of what RapidOCR reads otherwise it confirms more: mean
    probability of yes 0.60 (40 rounds: 0.40). 561 s of training, seed 0."""
    return replace(recipe(), steps=100)
