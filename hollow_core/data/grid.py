"""Pictures in rows and columns with their names, whole and in their own shapes."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

CELL = 256  # pixels that the longer side of a picture takes
LABEL = 240  # pixels that a row's name may be wide
TITLE = 180  # pixels that it may be wide at least
GAP = 12
LETTERS, SMALL = 18, 15
INK, GRAY, PAPER = (20, 20, 20), (95, 95, 95), (255, 255, 255)


class Row(NamedTuple):
    """Pictures beside one another."""

    name: str
    pictures: Sequence[Image.Image]
    note: str = ""
    """Below the name, smaller."""
    titles: Sequence[str] = ()
    """Above the pictures, which are titles of the rows below as well."""


class _Text(NamedTuple):
    lines: list[str]
    font: ImageFont.FreeTypeFont
    ink: tuple[int, int, int]

    @property
    def height(self) -> int:
        return round(1.3 * self.font.size) * len(self.lines)

    def draw(self, pen: ImageDraw.ImageDraw, left: int, top: int) -> None:
        for number, line in enumerate(self.lines):
            pen.text((left, top + round(1.3 * self.font.size) * number), line, self.ink, self.font)


def grid(rows: Sequence[Row], cell: int = CELL) -> Image.Image:
    """An RGB picture of all rows; small pictures are enlarged by whole numbers, so that their pixels can be seen."""
    large, small = font(LETTERS), font(SMALL)
    labels = [
        (_Text(wrapped(row.name, LABEL, large), large, INK), _Text(wrapped(row.note, LABEL, small), small, GRAY))
        for row in rows
    ]
    pictures = [[_scaled(picture, cell) for picture in row.pictures] for row in rows]
    column = max((picture.width for drawn in pictures for picture in drawn), default=cell)
    column = max(column, min(cell, TITLE) if any(row.titles for row in rows) else 0)
    titles = [[_Text(wrapped(title, column, small), small, GRAY) for title in row.titles] for row in rows]
    columns = max(max(len(row.pictures), len(row.titles)) for row in rows)
    across = column + GAP
    label = round(max(text.font.getlength(line) for pair in labels for text in pair for line in text.lines or [""]))
    left = GAP + label + GAP

    heads = [max((text.height for text in above), default=-GAP) + GAP for above in titles]
    bodies = [
        max(name.height + note.height, *(picture.height for picture in drawn), 0) + GAP
        for (name, note), drawn in zip(labels, pictures, strict=True)
    ]
    sheet = Image.new("RGB", (left + columns * across, GAP + sum(heads) + sum(bodies)), PAPER)
    pen, top = ImageDraw.Draw(sheet), GAP
    for (name, note), above, drawn, head, body in zip(labels, titles, pictures, heads, bodies, strict=True):
        for number, text in enumerate(above):
            text.draw(pen, left + number * across, top + head - GAP // 2 - text.height)
        top += head
        name.draw(pen, GAP, top)
        note.draw(pen, GAP, top + name.height)
        for number, picture in enumerate(drawn):
            sheet.paste(picture, (left + number * across, top))
        top += body
    return sheet


def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu, which comes with matplotlib: Pillow's own font has no letters beyond English."""
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(file), size)  # Pillow 10.1 takes no Path


def wrapped(text: str, width: int, letters: ImageFont.FreeTypeFont) -> list[str]:
    """The whole text in lines of at most `width` pixels; a word that is wider is broken."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            while letters.getlength(longer := f"{line} {word}".strip()) > width:
                if line:
                    lines.append(line)
                    line = ""
                else:
                    fits = next(
                        size for size in range(len(word), 0, -1) if size == 1 or letters.getlength(word[:size]) <= width
                    )
                    lines.append(word[:fits])
                    word = word[fits:]
            line = longer
        lines.append(line)
    return lines


def _scaled(picture: Image.Image, cell: int) -> Image.Image:
    """With a longer side of `cell` pixels, or of as many as a whole number of times gives."""
    longer = max(picture.size)
    if longer <= cell:
        times = cell // longer
        return picture.convert("RGB").resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    size = [max(round(side * cell / longer), 1) for side in picture.size]
    return picture.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS)
