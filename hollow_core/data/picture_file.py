"""A picture's file as a viewer shows it: upright, in the colours of sRGB, 8 bits deep, what is transparent on white."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from ..errors import HollowError

# Of cameras and of drawing programs. Apple's .heic and .heif are listed so that they are refused by name.
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".webp", ".bmp", ".dib", ".gif"),
    *(".tif", ".tiff", ".tga", ".jp2", ".j2k", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    *(".avif", ".heic", ".heif", ".hif"),
)
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "TGA", "JPEG2000", "PPM", "AVIF", "HEIF")
"""Pillow's names of these: of others some run another program."""

TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of Pillow, by an ICC profile's colour space
BLACK_POINT_COMPENSATION: Any = 0x2000  # lcms's flag, for which Pillow's versions have different names
WHITES = (1, 2**8 - 1, 2**16 - 1)  # usual values of white in 32 bits, which may mean any
HIGHLIGHTS = 16  # where 1 is white, what lights may be in floats
BROKEN = (
    *(OSError, SyntaxError, ValueError, RuntimeError, EOFError, LookupError, TypeError, ArithmeticError),
    struct.error,
)
"""What Pillow raises for files that are damaged, each decoder as it likes."""


class Shown(NamedTuple):
    """A picture as it is seen."""

    picture: Image.Image
    """RGB and upright."""
    alpha: Image.Image | None
    """How opaque it was (mode L); None where it was so all over."""


def open_picture(path: Path) -> Image.Image:
    """One picture, whole and upright, in RGB. Raises HollowError for a file that is none."""
    return open_shown(path).picture


def open_shown(path: Path) -> Shown:
    """One picture, whole and upright; of an animated one the first frame. Raises HollowError for a file that is none,
    or has too many pixels."""
    try:
        # Opened here, as Pillow maps files that it opens by name, and then mixes up TIFFs that are to be turned.
        with _patient(), path.open("rb") as data, Image.open(data, formats=_formats()) as file:
            return shown(file)
    except Image.DecompressionBombError as error:
        raise HollowError(f"{path} has too many pixels ({error}). Scale it down first.") from error
    except MemoryError as error:
        raise HollowError(f"{path} does not fit into memory. Scale it down first.") from error
    except BROKEN as error:
        raise HollowError(
            f"{path} cannot be read as a picture. Remove it from there, or save it again as .png or .jpg."
        ) from error


def shown(picture: Image.Image) -> Shown:
    """A picture as a viewer shows it: turned as its EXIF says, its profile's colours as sRGB has them, transparency
    laid on white. A profile that is broken, or of another kind of picture, is left out, as viewers do."""
    turn = TURNS.get(_orientation(picture))
    alpha = None
    if picture.mode.startswith("I") or picture.mode == "F":
        colours, alpha = _eight_bits(picture)
    elif picture.has_transparency_data:
        layer = picture.convert("RGBA")
        alpha, colours = layer.getchannel("A"), layer.convert("RGB")
        if picture.mode in ("L", "LA"):
            colours = colours.convert("L")
    else:
        colours = picture
    rgb = _in_srgb(colours, picture.info.get("icc_profile"))
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    if turn is not None:
        rgb, alpha = rgb.transpose(turn), alpha and alpha.transpose(turn)
    rgb.info.clear()  # the profile and the camera's notes are no longer true of it
    return Shown(rgb, alpha)


@contextmanager
def _patient() -> Iterator[None]:
    """Inside, Pillow is silent about what it can live with, and takes PNGs whose compressed texts or profile are larger
    than its usual megabyte: graphs and prompts are, and so are profiles of printers."""
    usual = PngImagePlugin.MAX_TEXT_CHUNK
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        PngImagePlugin.MAX_TEXT_CHUNK = usual


def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow and its plug-ins know."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _orientation(picture: Image.Image) -> int:
    """As EXIF or XMP say, from 1, which is upright, to 8. Not by ImageOps.exif_transpose, which also writes all EXIF
    anew, and ends where a number in it is broken."""
    picture.load()
    with suppress(*BROKEN):
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _eight_bits(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Shades of gray of 16 bits, 32 bits or floats as 8 bits (mode L), and their alpha."""
    tags = getattr(picture, "tag_v2", {})
    bits, form = _first(tags, ExifTags.Base.BitsPerSample, 16), _first(tags, ExifTags.Base.SampleFormat, 1)
    values = np.asarray(picture)
    if bits == 32 and form == 1 and picture.mode == "I":
        values = values.view(np.uint32)  # which Pillow knows as signed
    gray = np.nan_to_num(values.astype(np.float64), nan=0.0)
    if picture.mode == "F":
        level = float(np.quantile(gray[np.isfinite(values)], 0.999)) if np.isfinite(values).any() else 0.0
        white = next((white for white in WHITES if level <= max(white, HIGHLIGHTS)), level)
    elif bits == 32:
        white = next((white for white in WHITES if gray.max() <= white), 2 ** (32 - (form == 2)) - 1)
    else:
        white = 2 ** (bits - (form == 2)) - 1
    scaled = (gray / white * 255).round().clip(0, 255).astype(np.uint8)
    if _first(tags, ExifTags.Base.PhotometricInterpretation, 1) == 0:  # where 0 is white
        scaled = 255 - scaled
    clear = picture.info.get("transparency")
    alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)) if isinstance(clear, int) else None
    return Image.fromarray(scaled), alpha


def _first(tags: dict[int, Any], tag: int, otherwise: int) -> int:
    """The first number of a TIFF's tag."""
    value = tags.get(tag, otherwise)
    return int(value[0] if isinstance(value, tuple) else value)


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """A picture of 8 bits without alpha as RGB, in the colours of sRGB."""
    if picture.mode not in ("RGB", "L", "CMYK", "LAB"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    if profile and picture.mode != "LAB":
        with suppress(ImageCms.PyCMSError, OSError, ValueError):
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            mode = MODES.get(own.profile.xcolor_space)
            if mode == "RGB" and picture.mode == "L":
                picture = picture.convert("RGB")
            if mode == picture.mode:
                transform = ImageCms.buildTransform(
                    own,
                    ImageCms.createProfile("sRGB"),
                    mode,
                    "RGB",
                    ImageCms.Intent.RELATIVE_COLORIMETRIC,
                    BLACK_POINT_COMPENSATION,
                )
                if mode != "RGB" or not _is_srgb(transform):
                    picture = _converted(picture, transform)
    return picture.convert("RGB")


def _is_srgb(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether colours stay as they are but for rounding, as most pictures' do: to convert takes as long as to load."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    after = np.asarray(_converted(Image.fromarray(colours), transform))
    return int(np.abs(after.astype(int) - colours).max()) <= 1


def _converted(picture: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(picture, transform)
    assert converted is not None  # as it would be where it is asked to change the picture itself
    return converted
