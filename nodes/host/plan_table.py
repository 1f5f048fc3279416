"""The plan as a picture, for the node."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

WIDTH = 640  # twice that of the node, so that it stays sharp
LINE, MARGIN, SIZE = 34, 16, 24
LETTERS_A_LINE = 52
COLUMNS = (("cut", 60), ("precompute", 260), ("train", 430), ("", 480))  # right edges, but for the last
GIB = 2**30


class Row(NamedTuple):
    """What a cut needs, in bytes."""

    cut: int
    precompute: int
    train: int
    fits: bool

    @property
    def needed(self) -> int:
        """The higher of the two: the stages come one after the other."""
        return max(self.precompute, self.train)


def draw(title: str, rows: Sequence[Row], chosen: int, advice: str) -> Image.Image:
    """WIDTH wide; what fits is black, what does not is pale, and the chosen cut is marked."""
    title_lines, advice_lines = (textwrap.wrap(text, LETTERS_A_LINE) for text in (title, advice))
    height = 2 * MARGIN + LINE * (len(title_lines) + 1 + len(rows) + len(advice_lines)) + LINE // 2
    picture = Image.new("RGB", (WIDTH, height), "white")
    canvas = ImageDraw.Draw(picture)
    font = ImageFont.load_default(SIZE)
    y = MARGIN
    for line in title_lines:
        canvas.text((MARGIN, y), line, "black", font)
        y += LINE
    _cells(canvas, y, [name for name, _ in COLUMNS], "#666666", font)
    for row in rows:
        y += LINE
        if row.cut == chosen:
            canvas.rectangle((0, y - 3, WIDTH, y + LINE - 5), "#dbe8ff")
        color = "black" if row.fits else "#b06060"
        amounts = [f"{size / GIB:.2f}" for size in (row.precompute, row.train)]
        _cells(canvas, y, [str(row.cut), *amounts, "fits" if row.fits else "too much"], color, font)
    y += LINE // 2
    for line in advice_lines:
        y += LINE
        canvas.text((MARGIN, y), line, "black", font)
    return picture


def _cells(canvas: ImageDraw.ImageDraw, y: int, texts: Sequence[str], color: str, font: ImageFont.ImageFont) -> None:
    for (_, x), text, anchor in zip(COLUMNS, texts, ("ra", "ra", "ra", "la"), strict=True):
        canvas.text((x, y), text, color, font, anchor=anchor)
