"""Small signs drawn with PIL and matplotlib's fonts, for tests of readers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

WORLD = {
    "size": [32, 64],
    "colours": {"red": [190, 40, 40], "blue": [40, 70, 180], "yellow": [220, 190, 40], "white": [235, 235, 235]},
    "template": 'a {colour} sign that says "{word}"',
}
WORDS = ("CAT", "OPEN", "TEA", "HOTEL", "MAP", "SUN", "BUS", "KEY")
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono-Bold.ttf")


def sign(lines: str | Sequence[str], colour: str = "blue", height: int = 32, width: int = 64, size: int = 16):
    """(3, H, W) float in [0, 1]: centred lines, dark on light colours and light on dark ones."""
    rgb = tuple(WORLD["colours"][colour])
    image = Image.new("RGB", (width, height), rgb)
    ink = (20, 20, 20) if sum(rgb) > 400 else (240, 240, 240)
    text = lines if isinstance(lines, str) else "\n".join(lines)
    font = ImageFont.truetype(str(FONT), size)
    ImageDraw.Draw(image).text((width / 2, height / 2), text, fill=ink, font=font, anchor="mm", align="center")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def prompt_text(word: str, colour: str = "blue") -> str:
    return f'a {colour} sign that says "{word}"'
