"""The README's picture: `python recipes/signs/picture.py runs/quickstart assets/signs/quickstart.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SCALE, COLUMNS, MARGIN, LABEL = 3, 6, 6, 150


def picture(samples: Path) -> Image.Image:
    """One row per grid of a run (base, base with guidance, aligned), one column per prompt, what OCR read below."""
    grids = json.loads((samples / "index.json").read_text(encoding="utf-8"))
    first = Image.open(samples / grids[0]["images"][0]["file"])
    width, height = first.width * SCALE, first.height * SCALE
    cell = height + 18
    sheet = Image.new("RGB", (LABEL + COLUMNS * (width + MARGIN), len(grids) * (cell + MARGIN)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, grid in enumerate(grids):
        top = row * (cell + MARGIN)
        draw.text((4, top + height // 2 - 8), grid["title"], "black", font)
        for column, entry in enumerate(grid["images"][:COLUMNS]):
            left = LABEL + column * (width + MARGIN)
            sign = Image.open(samples / entry["file"]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(sign, (left, top))
            colour = "darkgreen" if entry["right"] else "firebrick"
            asked = entry["prompt"].split('"')[1]
            draw.text((left, top + height + 1), f"{asked}: read {entry['reads']['ocr'] or '-'}", colour, font)
    return sheet


if __name__ == "__main__":
    picture(Path(sys.argv[1]) / "samples").save(sys.argv[2], optimize=True)
