"""A picture of what was scored: the references, then every picture with its numbers and its prompt."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .scores import Score, mean

COLUMNS = 6
CELL = 216  # pixels
GAP = 12
LABEL = 66  # under a cell: a line of numbers, three of the prompt
HEAD = 34
INK, GRAY, PAPER = (20, 20, 20), (95, 95, 95), (255, 255, 255)


def score_grid(
    references: Sequence[Image.Image],
    pictures: Sequence[Image.Image],
    scores: Sequence[Score],
    prompts: Sequence[str] | None = None,
    real: Score | None = None,
) -> Image.Image:
    """An RGB sheet; `real` is the score of the references among themselves, each picture is shown whole."""
    columns = min(COLUMNS, max(len(references), len(pictures), 3))
    reference_rows, picture_rows = (-(-len(each) // columns) for each in (references, pictures))
    width = GAP + columns * (CELL + GAP)
    height = 2 * HEAD + reference_rows * (CELL + GAP) + picture_rows * (CELL + LABEL) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    title, bold, small = (ImageFont.load_default(size) for size in (16, 12, 12))

    def paste(picture: Image.Image, number: int, top: int, row_height: int) -> tuple[int, int]:
        left, upper = GAP + number % columns * (CELL + GAP), top + number // columns * row_height
        sheet.paste(ImageOps.pad(picture.convert("RGB"), (CELL, CELL), color=(238, 238, 238)), (left, upper))
        return left, upper + CELL

    top = _heading(pen, title, 0, f"references ({len(references)})", real, " to one another")
    for number, picture in enumerate(references):
        paste(picture, number, top, CELL + GAP)
    top += reference_rows * (CELL + GAP)
    top = _heading(pen, title, top, f"pictures ({len(pictures)})", mean(scores), " on average")
    for number, (picture, score) in enumerate(zip(pictures, scores, strict=True)):
        left, lower = paste(picture, number, top, CELL + LABEL)
        pen.text((left, lower + 4), numbers(score), INK, bold)
        if prompts is not None:
            lines = textwrap.wrap(prompts[number], 36, max_lines=3, placeholder=" …")
            pen.multiline_text((left, lower + 21), "\n".join(lines), GRAY, small, spacing=1)
    return sheet


def numbers(score: Score) -> str:
    """Such as "DINO .660  CLIP-I .805  CLIP-T .300"."""
    known = {"DINO": score.dino, "CLIP-I": score.clip_i, "CLIP-T": score.clip_t}
    return "  ".join(f"{name} {value:.3f}".replace("0.", ".") for name, value in known.items() if value is not None)


def _heading(pen: ImageDraw.ImageDraw, font: object, top: int, what: str, score: Score | None, how: str) -> int:
    text = what if score is None else f"{what}:   {numbers(score)}{how}"
    pen.text((GAP, top + 8), text, INK, font)  # type: ignore[arg-type]
    return top + HEAD
