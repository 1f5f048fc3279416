"""Training pictures from a folder: upright, without alpha, cropped to a square and never squashed."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import HollowError

# Apple's .heic and .heif are listed so that they are refused by name, not passed over in silence.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif")
MAX_UPSCALE = 8


class TrainingImage(NamedTuple):
    """One picture as training sees it."""

    picture: Image.Image
    """RGB, `resolution` pixels square."""
    caption: str | None
    """The text of NAME.txt beside NAME.png, None without one."""
    name: str
    """The file's name, with its suffix."""
    crop: tuple[int, int, int, int]
    """The square kept of the upright original: left, top, right, bottom in its pixels."""


def load_images(folder: Path, resolution: int) -> list[TrainingImage]:
    """Every picture of `folder`, by name, centre-cropped and scaled to `resolution` pixels square.

    Raises HollowError for a folder that is missing or without pictures, for a file that is no picture, and
    for one so small that it would be enlarged more than eight times.
    """
    check_resolution(resolution)
    paths = picture_paths(folder)
    if not paths:
        raise HollowError(f"{folder} holds no pictures. Put four or five of your subject there, .png or .jpg.")
    return [_load(path, resolution) for path in paths]


def picture_paths(folder: Path) -> list[Path]:
    """The pictures in `folder`, by name. Raises HollowError for a folder that is missing."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise HollowError(f"{folder} {what}. Give the folder that holds your pictures.")
    return sorted(path for path in folder.iterdir() if _is_picture(path))


def open_picture(path: Path) -> Image.Image:
    """One picture, whole and upright. Raises HollowError for a file that is none."""
    try:
        with Image.open(path) as file:
            return upright_rgb(file)
    except Image.DecompressionBombError as error:
        raise HollowError(f"{path} has too many pixels ({error}). Scale it down first.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise HollowError(
            f"{path} cannot be read as a picture. Remove it from there, or save it again as .png or .jpg."
        ) from error


def at_resolution(image: TrainingImage, resolution: int) -> TrainingImage:
    """The same picture at `resolution` pixels square, for BP-low. Raises HollowError if that is no multiple of 8."""
    check_resolution(resolution)
    return image._replace(picture=image.picture.resize((resolution, resolution), Image.Resampling.LANCZOS))


def upright_rgb(picture: Image.Image) -> Image.Image:
    """The picture as a viewer shows it: turned as its EXIF says, transparency laid on white, 8-bit RGB."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        picture = picture.convert("I").point(lambda value: value / 256).convert("L")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")


def centre_square(width: int, height: int) -> tuple[int, int, int, int]:
    """The largest square in the middle: left, top, right, bottom in pixels."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def check_resolution(resolution: int) -> None:
    """Raises HollowError unless it is a positive multiple of 8."""
    if resolution < 8 or resolution % 8:
        raise HollowError(f"The resolution {resolution} is no multiple of 8 pixels. Take 512, 768 or 1024.")


def _is_picture(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _load(path: Path, resolution: int) -> TrainingImage:
    picture = open_picture(path)
    if min(picture.size) * MAX_UPSCALE < resolution:
        raise HollowError(
            f"{path} is only {picture.width}×{picture.height} pixels. "
            f"Take a picture of at least {resolution // MAX_UPSCALE} pixels a side, better {resolution}."
        )
    crop = centre_square(*picture.size)
    square = picture.resize((resolution, resolution), Image.Resampling.LANCZOS, box=crop)
    return TrainingImage(square, _caption(path.with_suffix(".txt")), path.name, crop)


def _caption(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise HollowError(f"The caption {path} is no readable text. Save it as UTF-8, or remove it.") from error
