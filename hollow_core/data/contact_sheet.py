"""A contact sheet: training pictures small and whole, what crop and mask take away dimmed, what is learned of each."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from .grid import font, wrapped
from .images import TrainingImage

CELL = 240  # pixels; text is readable where a sheet of three columns is shown half as large
COLUMNS, ROWS = 3, 4
GAP = 16
LINE = 27  # of which a picture has three: two for its caption, one for its size
INK, GRAY, AMBER, PAPER = (20, 20, 20), (105, 105, 105), (176, 96, 0), (255, 255, 255)
DIM = (140, 140, 140)  # differs from snow as from night


class Cell(NamedTuple):
    """One picture on the sheet."""

    picture: Image.Image
    """RGB and whole, no side longer than `CELL`, what crop and mask take away dimmed."""
    caption: str
    size: tuple[int, int]
    """Width and height in pixels at which it is learned."""
    enlarged: float
    """How many times larger than it was."""


def cell(whole: Image.Image, image: TrainingImage, caption: str) -> Cell:
    """What is shown of `image`, made of the upright picture `whole` and learned with `caption`."""
    scale = CELL / max(whole.size)
    wide, high = (max(1, round(side * scale)) for side in whole.size)
    picture = whole.resize((wide, high), Image.Resampling.LANCZOS, reducing_gap=2)
    left, top, right, bottom = (round(edge * scale) for edge in image.crop)
    kept = picture.crop((left, top, right, bottom))
    picture = Image.blend(picture, Image.new("RGB", picture.size, DIM), 0.7)
    picture.paste(kept, (left, top), image.mask and image.mask.resize(kept.size))
    return Cell(picture, caption, image.picture.size, image.enlarged)


def contact_sheet(cells: Sequence[Cell], note: str = "", most: int = COLUMNS * ROWS) -> Image.Image:
    """The first of `cells`, at most so many, with caption and size, and how many more there are and a note below, as an
    RGB picture."""
    drawn, letters = cells[:most], font(20)
    columns = min(len(drawn), COLUMNS)
    row_height, width = CELL + 3 * LINE + GAP, GAP + columns * (CELL + GAP)
    below = [f"+ {len(cells) - len(drawn)} more"] if len(drawn) < len(cells) else []
    below += wrapped(note, width - 2 * GAP, letters)
    above = GAP + -(-len(drawn) // columns) * row_height
    sheet = Image.new("RGB", (width, above + LINE * len(below) + GAP * bool(below)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, each in enumerate(drawn):
        left, top = GAP + number % columns * (CELL + GAP), GAP + number // columns * row_height
        sheet.paste(each.picture, (left + (CELL - each.picture.width) // 2, top + (CELL - each.picture.height) // 2))
        for line, text in enumerate(_lines(each.caption, letters)):
            pen.text((left, top + CELL + 4 + line * LINE), text, INK, letters)
        pen.text((left, top + CELL + 4 + 2 * LINE), *_size(each), letters)
    for line, text in enumerate(below):
        pen.text((GAP, above + LINE * line), text, GRAY, letters)
    return sheet


def _lines(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """The beginning of `text`, in two lines that are no wider than a cell."""
    for characters in range(CELL // 4, 2, -1):
        lines = textwrap.wrap(text, characters, max_lines=2, placeholder=" …")
        if all(font.getlength(line) <= CELL for line in lines):
            return lines
    return []


def _size(each: Cell) -> tuple[str, tuple[int, int, int]]:
    size = f"{each.size[0]}×{each.size[1]}"
    return (size, GRAY) if each.enlarged < 1.05 else (f"{size}, enlarged {each.enlarged:.1f}×", AMBER)
