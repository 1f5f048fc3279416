"""What `hollow train` shows of the pictures before it starts: their sizes, and what is cut off."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from .app import console, say

if TYPE_CHECKING:
    from ..data.images import TrainingImage
    from ..models.model import Model
    from ..request import Request


def show_sizes(request: "Request", passed_over: Sequence[Path], not_read: Sequence[Path]) -> None:
    """A row for each size: how many pictures have it, and the most that one of them loses or is enlarged. Below, how
    many have captions, and what was not looked into or not read."""
    from ..data.caption_files import in_words
    from ..data.folders import buckets
    from ..data.images import named

    table = Table("pictures", "number", "size", "cropped at most", "enlarged at most")
    kinds = {"subject": request.images, "class": request.class_pictures, "held out": request.held_out}
    for name, images in kinds.items():
        for bucket in buckets(images):
            width, height = bucket.size
            enlarged = f"{bucket.enlarged:.1f}×" if bucket.enlarged > 1.05 else ""
            table.add_row(name, _number(bucket.images), f"{width}×{height}", f"{bucket.cropped:.0%}", enlarged)
    console.print(table)
    say(f"{in_words([image.caption for image in (*request.images, *request.held_out)])}.")
    if request.class_pictures:
        say(f"{in_words([image.caption for image in request.class_pictures])} of the class.")
    if passed_over:
        names = named([path.name for path in passed_over])
        say(f"Not looked into: {names}. Only folders that are named as 10_sks dog count, besides reg or class.")
    if not_read:
        say(f"Not read: {named([path.name for path in not_read])}. These are neither pictures nor captions of any.")


def show_unread(model: "Model", request: "Request") -> None:
    """Which captions are longer than the text encoder reads."""
    from ..data.images import named
    from ..models.base_model import chunks_lacking

    lacking = {
        image.name: chunks_lacking(model, request.personal_prompt(image))
        for image in (*request.images, *request.held_out)
    }
    names = [name for name, chunks in lacking.items() if chunks]
    if names:
        say(
            f"The captions of {named(names)} are longer than what the text encoder reads, so their ends are not "
            f"learned. Shorten them, or take --prompt-chunks {max(lacking.values())}."
        )


def _number(images: Sequence["TrainingImage"]) -> str:
    """ "3", or "3 × 10" where each is repeated."""
    repeats = sorted({image.repeats for image in images})
    return str(len(images)) + (f" × {'/'.join(map(str, repeats))}" if repeats != [1] else "")


def write_crops(path: Path, request: "Request") -> None:
    """Draw every picture with what is cut off or masked, its caption and its size. Raises HollowError where the file
    cannot be written."""
    from ..data.contact_sheet import cell, contact_sheet
    from ..data.picture_file import open_picture
    from ..files import write_png

    captioned = [(image, request.personal_prompt(image)) for image in (*request.images, *request.held_out)]
    captioned += [(image, request.class_prompt(image)) for image in request.class_pictures]
    cells = [cell(open_picture(image.path), image, caption) for image, caption in captioned if image.path is not None]
    write_png(path, contact_sheet(cells, most=len(cells)))
    say(f"What is cut off is drawn in {path}.")
