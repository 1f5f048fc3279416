"""Load Pictures: folders of ComfyUI's input/ with pictures, each cropped to the size at which it is learned."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import folder_paths
from PIL import Image
from torch import Tensor

from ...hollow_core.data import images
from ...hollow_core.data.caption_files import Captions, in_words
from ...hollow_core.data.contact_sheet import cell, contact_sheet
from ...hollow_core.errors import HollowError
from .files import inside
from .pictures import to_image, to_mask, to_pictures

ITSELF = "(input itself)"
NONE = "(none yet: upload one)"


class Loaded(NamedTuple):
    """What the node gives out and shows."""

    images: list[Tensor]
    """(1, height, width, 3) in 0…1 each."""
    captions: list[str]
    """One for each picture, or one for all."""
    masks: list[Tensor]
    """(1, height, width) in 0…1 for each picture, white where it has none."""
    sheet: Tensor
    """The contact sheet, likewise an IMAGE; it also says how many have captions, and what was not read."""


def picture_folders() -> list[str]:
    """The folders below ComfyUI's input/ that hold pictures, a/b for nested ones, and behind them input/ itself.

    Never empty: without any, the one entry says so.
    """
    base = Path(folder_paths.get_input_directory())
    names, seen = [], set[str]()
    for place, folders, files in os.walk(base, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        # Only as far as the first: the list is asked for at the start, and again and again after it.
        if any(images.is_picture(Path(place, name)) for name in files):
            names.append(Path(place).relative_to(base).as_posix())
    return [*sorted(name for name in names if name != "."), *[ITSELF] * ("." in names)] or [NONE]


def folder_of(name: str) -> Path:
    """The folder that one of `picture_folders` stands for. Raises HollowError for one that leads out of input/."""
    base = Path(folder_paths.get_input_directory())
    if name == ITSELF:
        return base
    if name == NONE:
        raise HollowError(
            "There is no folder of pictures in ComfyUI's input folder yet. "
            "Press 'upload a folder', or put one there and press R."
        )
    return inside(base, name)


def state_of(name: str) -> list[tuple[str, int, int]]:
    """Name, time and size of every picture in a folder, of its texts and its mask; differs when one of them does."""
    folder = folder_of(name)
    paths, captions = images.training_paths(folder), Captions(folder)
    beside = (file for path in paths for file in (path, *captions.beside(path), images.mask_path(path)))
    files = [file for file in (*beside, *captions.tables) if file is not None]
    return [(file.name, (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files]


def load(
    folder: str, given: Sequence[Tensor], resolution: int, square: bool, caption: str, alpha_mask: bool = False
) -> Loaded:
    """The pictures of a folder, or those `given` as IMAGEs; `caption` is for those without a text of their own, and
    with `alpha_mask` what is transparent in one without a mask counts as black there.

    Raises HollowError as `hollow_core.data.images.load_images` does, and for a name that leads out of input/.
    """
    images.check_resolution(resolution)
    caption = caption.strip()
    loaded, cells, not_read = [], [], list[Path]()
    for picture, mask, name, text in _given(given) if given else _in_folder(folder_of(folder), alpha_mask, not_read):
        size = (resolution, resolution) if square else images.size_near(*picture.size, resolution)
        image = images.fit(picture, size, name, text, mask)
        loaded.append(image)
        cells.append(cell(picture, image, text or caption))
    captions = [image.caption or caption for image in loaded]
    if not any(image.caption for image in loaded):
        captions = [caption]  # or what is drawn from the captions would be drawn once for each
    masks = [to_mask(image.mask or Image.new("L", image.picture.size, "white")) for image in loaded]
    told = f"{in_words([image.caption for image in loaded])}."
    if not_read:
        told += f" Not read: {images.named([path.name for path in not_read])}."
    return Loaded([to_image(image.picture) for image in loaded], captions, masks, to_image(contact_sheet(cells, told)))


Picture = tuple[Image.Image, Image.Image | None, str, str | None]
"""Whole and upright; its mask, its name and its text."""


def _in_folder(folder: Path, alpha_mask: bool, not_read: list[Path]) -> Iterator[Picture]:
    paths, captions = images.training_paths(folder), Captions(folder)
    for path in paths:
        yield *images.open_masked(path, alpha_mask), path.name, captions.of(path)
    not_read += images.not_read(folder, captions.read)


def _given(batches: Sequence[Tensor]) -> Iterator[Picture]:
    for number, picture in enumerate(to_pictures(batches), start=1):
        yield picture, None, f"Picture {number}", None
