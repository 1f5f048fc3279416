"""Training pictures from a folder: upright, without alpha, cropped and never squashed."""

import glob
from collections.abc import Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..errors import HollowError
from .caption_files import Captions
from .picture_file import SUFFIXES, open_picture, open_shown
from .prompts import Subject

MASK = "-mask"  # behind the name of a picture: its mask
MAX_UPSCALE = 8
GRID = 64  # pixels, of which the sides of a picture that is no square are multiples
OF_SYSTEMS = ("thumbs.db", "desktop.ini")  # which nobody put there


class TrainingImage(NamedTuple):
    """One picture as training sees it."""

    picture: Image.Image
    """RGB, at the size at which it is learned."""
    caption: str | None
    """As `Captions` finds it beside the picture, None without one."""
    name: str
    """The file's name, with its suffix."""
    crop: tuple[int, int, int, int]
    """What is kept of the upright original: left, top, right, bottom in its pixels."""
    whole: tuple[int, int] | None = None
    """Width and height of the upright original in pixels; None: it ends with the crop."""
    mask: Image.Image | None = None
    """How much each pixel of `picture` counts, from black to white (mode L); None: all alike."""
    repeats: int = 1
    """How often it is learned for once of the others."""
    subject: Subject | None = None
    """Whom it shows, where its folder says so."""
    path: Path | None = None
    """Where the original is, if on a disk."""

    @property
    def where(self) -> str:
        """Which one it is, in a sentence: in folders many have one name."""
        return str(self.path or self.name)

    @property
    def original(self) -> tuple[int, int]:
        """`whole`, or where the crop ends."""
        return self.whole or self.crop[2:]

    @property
    def cropped(self) -> float:
        """The share of the original that is cut off, from 0 to 1."""
        left, top, right, bottom = self.crop
        width, height = self.original
        return 1 - (right - left) * (bottom - top) / (width * height)

    @property
    def enlarged(self) -> float:
        """How many times larger than it was; below 1 where it shrinks."""
        return self.picture.width / (self.crop[2] - self.crop[0])

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """What SDXL is told of it: the original's height and width, top and left of the crop, height and width; all in
        pixels, the crop in those of the original scaled as the picture is (Podell et al. 2023, section 2.2)."""
        left, top, right, bottom = self.crop
        width, height = self.picture.size
        whole = self.original
        across, down = round(left * width / (right - left)), round(top * height / (bottom - top))
        return whole[1], whole[0], down, across, height, width


def load_images(
    folder: Path, resolution: int, *, square: bool = False, alpha_mask: bool = False
) -> list[TrainingImage]:
    """Every picture of `folder`, by name, centre-cropped and scaled to its size, which `size_near` gives.

    With `square` it is `resolution` pixels square. A file NAME-mask.png beside NAME.jpg is the picture's mask; with
    `alpha_mask` what is transparent in a picture without one counts as black there. Raises HollowError for a folder
    that is missing or without pictures, for a file that is no picture, for one so small that it would be enlarged more
    than eight times, for a mask that does not fit, and for a resolution that is no multiple of 64 (`square`: 8).
    """
    check_resolution(resolution)
    paths, captions = training_paths(folder), Captions(folder)
    return [load_image(path, resolution, square, alpha_mask, captions) for path in paths]


def load_image(
    path: Path, resolution: int, square: bool = False, alpha_mask: bool = False, captions: Captions | None = None
) -> TrainingImage:
    """One picture, as `load_images` loads it; `captions` are those of its folder, if they are known already."""
    check_resolution(resolution)
    picture, mask = open_masked(path, alpha_mask)
    size = (resolution, resolution) if square else size_near(*picture.size, resolution)
    image = fit(picture, size, path.name, (captions or Captions(path.parent)).of(path), mask)
    return image._replace(path=path)


def training_paths(folder: Path) -> list[Path]:
    """The pictures in `folder`, by name. Raises HollowError for a folder that is missing or has none."""
    paths = picture_paths(folder)
    if not paths:
        raise no_pictures(folder, "Put four or five of your subject there, .png or .jpg")
    return paths


def picture_paths(folder: Path) -> list[Path]:
    """The pictures in `folder`, by name. Raises HollowError for a folder that is missing."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise HollowError(f"{folder} {what}. Give the folder that holds your pictures.")
    paths = sorted(path for path in folder.iterdir() if is_picture(path))
    names = {path.stem for path in paths}
    return [path for path in paths if not (path.stem.endswith(MASK) and path.stem.removesuffix(MASK) in names)]


def is_picture(path: Path) -> bool:
    """Whether `picture_paths` counts it: a file named as a picture, and not hidden."""
    return path.is_file() and path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def not_read(folder: Path, told: Set[Path] = frozenset()) -> list[Path]:
    """The files in `folder` that are neither pictures nor those `told` from which captions were read, by name."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not is_picture(path)
        and path not in told
        and not path.name.startswith(".")
        and path.name.lower() not in OF_SYSTEMS
    ]


def no_pictures(folder: Path, advice: str, or_else: str = "") -> HollowError:
    """What is said of a folder without pictures: where there are some further down, and `or_else` what may be done; or
    `advice`, and what is there instead."""
    below = [place for depth in ("*", "*/*") for place in sorted(folder.glob(depth)) if _holds_pictures(place)]
    if below:
        where = named([place.relative_to(folder).as_posix() for place in below])
        return HollowError(
            f"{folder} holds no pictures itself, but there are some in {where}. Give {below[0]}{or_else}."
        )
    others = [path.name for path in not_read(folder)]
    instead = f" What is there is not read: {named(others)}." if others else ""
    return HollowError(f"{folder} holds no pictures. {advice}.{instead}")


def _holds_pictures(place: Path) -> bool:
    with suppress(OSError):
        return place.is_dir() and not place.name.startswith(".") and any(map(is_picture, place.iterdir()))
    return False


def named(names: Sequence[str], most: int = 5) -> str:
    """The first of them and how many more there are: "a.psd, b.psd and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def open_masked(path: Path, alpha_mask: bool = False) -> tuple[Image.Image, Image.Image | None]:
    """One picture, whole and upright, and its mask of the same size (mode L), if it has one. Raises HollowError as
    `load_images` does."""
    picture, alpha = open_shown(path)
    return picture, _mask(path, picture.size) or (alpha if alpha_mask else None)


def fit(
    picture: Image.Image,
    size: tuple[int, int],
    name: str,
    caption: str | None = None,
    mask: Image.Image | None = None,
) -> TrainingImage:
    """An upright RGB picture, centre-cropped to the shape of `size` (width, height in pixels) and scaled to it, and so
    its mask, of the picture's size.

    Raises HollowError for one that would be enlarged more than eight times, and where the mask leaves nothing.
    """
    crop = centre_crop(*picture.size, size)
    if (crop[2] - crop[0]) * MAX_UPSCALE < size[0] or (crop[3] - crop[1]) * MAX_UPSCALE < size[1]:
        raise HollowError(
            f"{name} is only {picture.width}×{picture.height} pixels. "
            f"Take a picture of at least {min(size) // MAX_UPSCALE} pixels a side, better {min(size)}."
        )
    scaled = picture.resize(size, Image.Resampling.LANCZOS, box=crop)
    if mask is not None:
        mask = mask.resize(size, Image.Resampling.BILINEAR, box=crop)
        if not mask.getbbox():
            raise HollowError(f"The mask of {name} is black all over. Paint white what is to be learned, or remove it.")
    return TrainingImage(scaled, caption, name, crop, picture.size, mask)


def smaller(image: TrainingImage, factor: float) -> TrainingImage:
    """The same picture at about `factor` times its size, its sides multiples of 8 pixels; for BP-low.

    What no longer fits the shape is cropped.
    """
    width, height = (max(round(side * factor / 8), 1) * 8 for side in image.picture.size)
    box = centre_crop(*image.picture.size, (width, height))
    picture = image.picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    mask = image.mask and image.mask.resize((width, height), Image.Resampling.BILINEAR, box=box)
    scale = (image.crop[2] - image.crop[0]) / image.picture.width
    left, top = image.crop[:2]
    crop = (left + box[0] * scale, top + box[1] * scale, left + box[2] * scale, top + box[3] * scale)
    a, b, c, d = map(round, crop)
    return image._replace(picture=picture, mask=mask, crop=(a, b, c, d))


def mask_path(path: Path) -> Path | None:
    """NAME-mask.png beside the picture NAME.jpg, None without one."""
    beside = sorted(path.parent.glob(f"{glob.escape(path.stem)}{MASK}.*"))
    return next(filter(is_picture, beside), None)


def _mask(path: Path, size: tuple[int, int]) -> Image.Image | None:
    """What is in a picture's `mask_path`, at the picture's `size`."""
    beside = mask_path(path)
    if beside is None:
        return None
    mask = open_picture(beside).convert("L")
    if abs(mask.width * size[1] - mask.height * size[0]) > 0.02 * mask.width * size[1]:
        raise HollowError(
            f"The mask {beside} is {mask.width}×{mask.height} pixels, its picture {size[0]}×{size[1]}. "
            "Draw it on the picture, in the same shape."
        )
    return mask.resize(size, Image.Resampling.BILINEAR)


def size_near(width: int, height: int, resolution: int) -> tuple[int, int]:
    """The size (width, height in pixels) at which a picture of `width` × `height` loses least to the crop.

    Of all whose sides are multiples of 64, below 256 of an eighth of `resolution`, and at least half of it, and whose
    area is within a tenth of its square. Raises HollowError where `resolution` itself is no multiple of 64.
    """
    if resolution < GRID or resolution % GRID:
        raise HollowError(
            f"The resolution {resolution} is no multiple of {GRID} pixels, which pictures that keep their shape need. "
            "Take 512, 768 or 1024, or crop them to squares."
        )
    area = resolution * resolution
    grid = GRID if resolution >= 256 else resolution // 8
    sides = [side for side in range(grid, 2 * resolution + 1, grid) if 2 * side >= resolution]
    sizes = [(wide, high) for wide in sides for high in sides if 10 * abs(wide * high - area) <= area]

    def kept(size: tuple[int, int]) -> tuple[float, int]:
        across, down = width * size[1], height * size[0]
        return min(across, down) / max(across, down), -abs(size[0] * size[1] - area)

    return max(sizes, key=kept)


def centre_crop(width: int, height: int, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest part in the middle with the shape of `shape` (width, height): left, top, right, bottom in pixels."""
    wide = min(width, max(round(height * shape[0] / shape[1]), 1))
    high = min(height, max(round(width * shape[1] / shape[0]), 1))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def check_resolution(resolution: int) -> None:
    """Raises HollowError unless it is a positive multiple of 8."""
    if resolution < 8 or resolution % 8:
        raise HollowError(f"The resolution {resolution} is no multiple of 8 pixels. Take 512, 768 or 1024.")
