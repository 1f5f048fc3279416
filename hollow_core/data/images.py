"""Training pictures from a folder: upright, without alpha, cropped and never squashed."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import HollowError

# Apple's .heic and .heif are listed so that they are refused by name, not passed over in silence.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif")
MAX_UPSCALE = 8
GRID = 64  # pixels, of which the sides of a picture that is no square are multiples


class TrainingImage(NamedTuple):
    """One picture as training sees it."""

    picture: Image.Image
    """RGB, at the size at which it is learned."""
    caption: str | None
    """The text of NAME.txt beside NAME.png, None without one."""
    name: str
    """The file's name, with its suffix."""
    crop: tuple[int, int, int, int]
    """What is kept of the upright original: left, top, right, bottom in its pixels."""


def load_images(folder: Path, resolution: int) -> list[TrainingImage]:
    """Every picture of `folder`, by name, centre-cropped and scaled to `resolution` pixels square.

    Raises HollowError for a folder that is missing or without pictures, for a file that is no picture, and
    for one so small that it would be enlarged more than eight times.
    """
    check_resolution(resolution)
    size = (resolution, resolution)
    return [fit(open_picture(path), size, path.name, caption_of(path)) for path in training_paths(folder)]


def training_paths(folder: Path) -> list[Path]:
    """The pictures in `folder`, by name. Raises HollowError for a folder that is missing or has none."""
    paths = picture_paths(folder)
    if not paths:
        raise HollowError(f"{folder} holds no pictures. Put four or five of your subject there, .png or .jpg.")
    return paths


def picture_paths(folder: Path) -> list[Path]:
    """The pictures in `folder`, by name. Raises HollowError for a folder that is missing."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise HollowError(f"{folder} {what}. Give the folder that holds your pictures.")
    return sorted(path for path in folder.iterdir() if is_picture(path))


def is_picture(path: Path) -> bool:
    """Whether `picture_paths` counts it: a file named as a picture, and not hidden."""
    return path.is_file() and path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


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


def caption_of(path: Path) -> str | None:
    """The text of NAME.txt beside the picture NAME.png, None without one. Raises HollowError if it is no UTF-8."""
    path = path.with_suffix(".txt")
    try:
        return path.read_text(encoding="utf-8-sig").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise HollowError(f"The caption {path} is no readable text. Save it as UTF-8, or remove it.") from error


def fit(picture: Image.Image, size: tuple[int, int], name: str, caption: str | None = None) -> TrainingImage:
    """An upright RGB picture, centre-cropped to the shape of `size` (width, height in pixels) and scaled to it.

    Raises HollowError for one that would be enlarged more than eight times.
    """
    crop = centre_crop(*picture.size, size)
    if (crop[2] - crop[0]) * MAX_UPSCALE < size[0] or (crop[3] - crop[1]) * MAX_UPSCALE < size[1]:
        raise HollowError(
            f"{name} is only {picture.width}×{picture.height} pixels. "
            f"Take a picture of at least {min(size) // MAX_UPSCALE} pixels a side, better {min(size)}."
        )
    return TrainingImage(picture.resize(size, Image.Resampling.LANCZOS, box=crop), caption, name, crop)


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


def size_near(width: int, height: int, resolution: int) -> tuple[int, int]:
    """The size (width, height in pixels) at which a picture of `width` × `height` loses least to the crop.

    Of all whose sides are multiples of 64 and at least half of `resolution`, and whose area is within a tenth of its
    square. Raises HollowError where `resolution` itself is no multiple of 64.
    """
    if resolution < GRID or resolution % GRID:
        raise HollowError(
            f"The resolution {resolution} is no multiple of {GRID} pixels, which pictures that keep their shape need. "
            "Take 512, 768 or 1024, or crop them to squares."
        )
    area = resolution * resolution
    sides = [side for side in range(GRID, 2 * resolution + 1, GRID) if 2 * side >= resolution]
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
