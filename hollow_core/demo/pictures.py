"""The demo's figure: a labelled grid of pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..files import write_png

CELL = 128  # pixels
MARGIN = 6
LABEL = 190


def save_grid(
    path: Path,
    references: Sequence[Image.Image],
    rows: Mapping[str, tuple[Sequence[Image.Image], str]],
    columns: Sequence[str],
) -> None:
    """A row of references, then one for each entry of `rows` (pictures and a note), under `columns` titles."""
    height = CELL + MARGIN
    sheet = Image.new(
        "RGB", (LABEL + max(len(references), len(columns)) * height, (len(rows) + 1) * height + 26), "white"
    )
    pen = ImageDraw.Draw(sheet)
    title, small = ImageFont.load_default(15), ImageFont.load_default(13)

    def put(top: int, name: str, note: str, drawn: Sequence[Image.Image]) -> None:
        pen.multiline_text((8, top + 34), name.replace(", ", ",\n"), "black", title)
        pen.multiline_text((8, top + 78), note, (95, 95, 95), small)
        for column, picture in enumerate(drawn):
            large = picture.convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST)
            sheet.paste(large, (LABEL + column * height, top))

    put(0, "references", "five pictures in", references)
    for column, name in enumerate(columns):
        pen.text((LABEL + column * height + CELL // 2, height + 12), name, (60, 60, 60), small, anchor="mm")
    for row, (name, (drawn, note)) in enumerate(rows.items(), start=1):
        put(row * height + 26, name, note, drawn)
    write_png(path, sheet)
