"""Results of several methods on one picture: a row per prompt and seed, a column per method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from alignkit.inference.sampling import LINE, MARGIN, SHOWN_FRAMES, Sample, shortened, tile_of

NARROWEST = 160  # pixels of a column, so that what is written under a picture can be read


@dataclass(frozen=True)
class Column:
    """One method's results.

    Attributes:
        title: what stands above them.
        samples: one per row.
        scores: the lines under each sample, as many for each.
    """

    title: str
    samples: Sequence[Sample]
    scores: Sequence[Sequence[str]]


def side_by_side(columns: Sequence[Column]) -> Image.Image:
    """The columns beside each other, row i being sample i of each; a video is a strip of some of its frames."""
    frames = max(3, SHOWN_FRAMES // len(columns))
    tiles = [[tile_of(one.media, frames) for one in column.samples] for column in columns]
    width, height = tiles[0][0].size
    zoom = max(1, NARROWEST // width)
    wide = max(NARROWEST, zoom * width) + 2 * MARGIN
    high = zoom * height + 2 * MARGIN + (1 + len(columns[0].scores[0])) * LINE
    top = MARGIN + LINE
    sheet = Image.new("RGB", (len(columns) * wide, top + len(tiles[0]) * high), "white")
    pen = ImageDraw.Draw(sheet)
    for c, column in enumerate(columns):
        left = c * wide + MARGIN
        pen.text((left, MARGIN), shortened(pen, column.title, wide - 2 * MARGIN), fill="black")
        for r, (tile, one, scores) in enumerate(zip(tiles[c], column.samples, column.scores, strict=True)):
            y = top + r * high + MARGIN
            sheet.paste(tile.resize((zoom * width, zoom * height), Image.Resampling.NEAREST), (left, y))
            lines = [f"{one.prompt} (seed {one.seed})", *scores]
            for k, line in enumerate(lines):
                text = shortened(pen, line, wide - 2 * MARGIN)
                pen.text((left, y + zoom * height + 2 + k * LINE), text, fill="gray" if k else "black")
    return sheet
