"""The sign world: small coloured signs with one word, and the imperfect captions that the generator learns from.

A prompt fixes the colour and the word. It leaves free the font, the shade and a small offset; whether an aligned
generator still varies those is the diversity that the report measures.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

HEIGHT, WIDTH = 24, 64
CELL = 12  # pixels a letter may use; fixed cells are what made spelling learnable quickly
BASELINE = 18
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TEXT_RGB = (245, 245, 240)
TEMPLATE = 'a {colour} sign that says "{word}"'
COLOURS = {
    "red": (190, 40, 40),
    "green": (40, 140, 50),
    "blue": (40, 70, 200),
    "purple": (125, 40, 150),
    "orange": (225, 120, 20),
    "teal": (15, 140, 145),
    "pink": (225, 90, 160),
    "gray": (105, 105, 105),
}
# font name -> (file in matplotlib's wheel, size in points, widest glyph in pixels; wider ones are squeezed)
FONTS = {
    "mono": ("DejaVuSansMono-Bold.ttf", 18, 12),
    "oblique": ("DejaVuSansMono-BoldOblique.ttf", 18, 12),
    "serif": ("DejaVuSerif-Bold.ttf", 17, 11),
}
SHADE = (0.85, 1.15)
DEFOCUS_PIXELS = (2.4, 3.6)  # Gaussian sigma; the recogniser still reads 2.0
RANDOM_STRING_SHARE = 0.5

WORDS_FILE = Path(__file__).with_name(
    "words.txt"
)  # everyday, inoffensive words of 3 to 5 letters, chosen by hand
HELD_OUT_PER_LENGTH = 40
SPLIT_SEED = 20


@dataclass(frozen=True)
class Variety:
    """How much pictures differ where the prompt does not say, and how imperfect the pretraining data are."""

    fonts: tuple[str, ...]
    max_offset: int  # pixels, both axes
    misspelt: float  # share of captions with one or two letters that are not the sign's
    transposed: float  # share of captions with the last two letters exchanged
    defocused: float  # share of signs


WIDE = Variety(("mono", "oblique", "serif"), max_offset=2, misspelt=0.4, transposed=0.0, defocused=0.35)
NARROW = Variety(("mono", "serif"), max_offset=1, misspelt=0.33, transposed=0.0, defocused=0.25)
# Guidance sharpens what most captions say and mends rare, random typos well. One typo that comes up again and again
# is what it mends badly, and a reward can.
TRANSPOSED = Variety(("mono", "serif"), max_offset=1, misspelt=0.05, transposed=0.42, defocused=0.25)
FINAL = Variety(("mono", "serif"), max_offset=1, misspelt=0.05, transposed=0.28, defocused=0.2)


@dataclass(frozen=True)
class Sign:
    """One picture: what the prompt names (word, colour) and what it leaves free."""

    word: str
    colour: str
    font: str = "mono"
    shade: float = 1.0
    offset: tuple[int, int] = (0, 0)  # (right, down) in pixels
    defocus: float = 0.0  # Gaussian sigma in pixels


def prompt_for(word: str, colour: str) -> str:
    return TEMPLATE.format(colour=colour, word=word)


@cache
def _glyph(font: str, letter: str) -> np.ndarray:
    """Coverage (48, CELL + 4) in [0, 1]; baseline at row 32, letter centred."""
    file, size, widest = FONTS[font]
    typeface = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{file}", size)
    canvas = Image.new("L", (48, 48), 0)
    ImageDraw.Draw(canvas).text((24, 32), letter, font=typeface, fill=255, anchor="ms")
    left, _, right, _ = canvas.getbbox() or (0, 0, 1, 1)
    ink = canvas.crop((left, 0, right, 48))
    if ink.width > widest:
        ink = ink.resize((widest, 48), Image.Resampling.LANCZOS)
    cell = Image.new("L", (CELL + 4, 48), 0)
    cell.paste(ink, ((cell.width - ink.width) // 2, 0))
    return np.asarray(cell, np.float32) / 255


def draw(sign: Sign) -> np.ndarray:
    """The sign as (HEIGHT, WIDTH, 3) uint8; the same Sign always gives the same pixels."""
    right, down = sign.offset
    coverage = np.zeros((HEIGHT, WIDTH), np.float32)
    start = (WIDTH - CELL * len(sign.word)) // 2 + right - 2
    top = 32 - BASELINE - down
    for i, letter in enumerate(sign.word):
        x = start + CELL * i
        lo, hi = max(0, -x), min(CELL + 4, WIDTH - x)
        ink = _glyph(sign.font, letter)[top : top + HEIGHT, lo:hi]
        coverage[:, x + lo : x + hi] = np.maximum(coverage[:, x + lo : x + hi], ink)
    ground = np.clip(np.array(COLOURS[sign.colour], np.float32) * sign.shade, 0, 255)
    pixels = ground + (np.array(TEXT_RGB, np.float32) - ground) * coverage[..., None]
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    if sign.defocus:
        picture = picture.filter(ImageFilter.GaussianBlur(sign.defocus))
    return np.asarray(picture)


def misspell(word: str, rng: np.random.Generator) -> str:
    """The word with one or two letters exchanged for others."""
    letters = list(word)
    for position in rng.choice(len(word), size=1 if rng.random() < 0.6 else 2, replace=False):
        letters[position] = LETTERS[rng.integers(26)]
    return "".join(letters)


def split_words() -> tuple[list[str], list[str]]:
    """(training words, held-out words), sorted by length and spelling; fixed by `SPLIT_SEED`."""
    every = sorted(WORDS_FILE.read_text("utf-8").split(), key=lambda word: (len(word), word))
    held_out: set[str] = set()
    for length in (3, 4, 5):
        candidates = [word for word in every if len(word) == length]
        held_out.update(random.Random(SPLIT_SEED + length).sample(candidates, HELD_OUT_PER_LENGTH))
    return [w for w in every if w not in held_out], [w for w in every if w in held_out]


def mistake(word: str, variety: Variety, rng: np.random.Generator) -> str:
    """What a sign captioned `word` says."""
    kind = rng.random()
    if kind < variety.misspelt:
        return misspell(word, rng)
    if kind < variety.misspelt + variety.transposed:
        return word[:-2] + word[-1] + word[-2]
    return word


@cache
def _split() -> tuple[tuple[str, ...], frozenset[str]]:
    train_words, held_out = split_words()
    return tuple(train_words), frozenset(held_out)


def pretraining_word(rng: np.random.Generator) -> str:
    """A training word or a random letter string, never a held-out word."""
    train_words, held_out = _split()
    while True:
        if rng.random() >= RANDOM_STRING_SHARE:
            return train_words[rng.integers(len(train_words))]
        word = "".join(LETTERS[i] for i in rng.integers(26, size=rng.integers(3, 6)))
        if word not in held_out:
            return word


def random_sign(
    rng: np.random.Generator, word: str, colour: str, variety: Variety = FINAL, defocus: float = 0.0
) -> Sign:
    """A sign whose font, shade and offset, which no prompt names, are drawn uniformly."""
    font = variety.fonts[rng.integers(len(variety.fonts))]
    right, down = (int(v) for v in rng.integers(-variety.max_offset, variety.max_offset + 1, size=2))
    return Sign(word, colour, font, float(rng.uniform(*SHADE)), (right, down), defocus)


def pretraining_pair(rng: np.random.Generator, variety: Variety = FINAL) -> tuple[str, Sign]:
    """(prompt, sign) as a web crawl might have it: some captions misspell the sign, some signs are out of focus."""
    _, held_out = _split()
    word, colour = pretraining_word(rng), list(COLOURS)[rng.integers(len(COLOURS))]
    shown = mistake(word, variety, rng)
    while shown in held_out:  # a held-out word must not be seen even as a mistake
        shown = mistake(word, variety, rng)
    defocus = float(rng.uniform(*DEFOCUS_PIXELS)) if rng.random() < variety.defocused else 0.0
    return prompt_for(word, colour), random_sign(rng, shown, colour, variety, defocus)


def write_world(path: Path) -> None:
    """Write world.json: what rewards, recipes and reports need to know of this world."""
    train_words, held_out = split_words()
    record = {
        "size": [HEIGHT, WIDTH],
        "colours": {name: list(rgb) for name, rgb in COLOURS.items()},
        "template": TEMPLATE,
        "text_rgb": list(TEXT_RGB),
        "fonts": list(FINAL.fonts),
        "shade": list(SHADE),
        "max_offset": FINAL.max_offset,
        "train_words": train_words,
        "held_out_words": held_out,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
