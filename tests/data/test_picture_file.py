"""Pictures as cameras, phones and drawing programs write them, and what a viewer shows."""

import io
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from icc_profiles import ADOBE_RGB, DISPLAY_P3, SRGB, cmyk_profile, gray_profile, rgb_profile
from PIL import Image, ImageCms, features

from hollow_core.data.picture_file import open_picture, open_shown
from hollow_core.errors import HollowError

GREEN = (96, 159, 70)
SIZE = (16, 8)
NUMBERS = np.linspace(0, 1, 128).reshape(8, 16)  # from black to white


def colour(path: Path) -> tuple[int, ...]:
    """Of its middle, in RGB."""
    return tuple(open_picture(path).getpixel((8, 4)))


def near(colour: tuple[int, ...], to: tuple[int, ...], tolerance: int = 2) -> bool:
    return len(colour) == len(to) and all(abs(a - b) <= tolerance for a, b in zip(colour, to, strict=True))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp", "a.avif"])
def test_a_cameras_colours_are_those_of_the_screen(tmp_path: Path, name: str) -> None:
    """Adobe RGB, whose numbers mean more colourful greens. The right value is from the definitions of both spaces."""
    if name == "a.avif" and "avif" not in features.get_supported():
        pytest.skip("this Pillow has no AVIF")
    options = {"lossless": True} if name == "a.webp" else {"quality": 100}
    Image.new("RGB", SIZE, GREEN).save(tmp_path / name, icc_profile=rgb_profile(ADOBE_RGB), **options)
    assert near(colour(tmp_path / name), (41, 160, 60), 8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "P with transparency"])
def test_a_phones_colours_in_every_kind_of_picture(tmp_path: Path, mode: str) -> None:
    """Display P3; where a picture is transparent, the colour of the white below is white. Greys stay what they are."""
    picture = Image.new("RGBA", SIZE, (*GREEN, 255))
    if mode in ("RGBA", "LA", "P with transparency"):
        picture.paste((0, 0, 0, 0), (0, 0, 4, 8))
    picture = picture.quantize(4) if mode == "P with transparency" else picture.convert(mode)
    picture.save(tmp_path / "a.png", icc_profile=rgb_profile(DISPLAY_P3))
    gray = picture.getpixel((8, 4)) if mode == "L" else 132
    assert near(colour(tmp_path / "a.png"), (gray,) * 3 if mode[0] == "L" else (71, 163, 52), 3)
    left = open_picture(tmp_path / "a.png").getpixel((1, 4))
    assert (left == (255, 255, 255)) == (mode in ("RGBA", "LA", "P with transparency"))


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_grey_profile(tmp_path: Path, mode: str) -> None:
    """Of linear light: a fifth of white's is the middle grey of sRGB."""
    picture = Image.new("LA", SIZE, (55, 255)).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = Image.fromarray(np.full((8, 16), 55 * 257, np.uint16))
    picture.save(tmp_path / "a.png", icc_profile=gray_profile(1.0))
    assert near(colour(tmp_path / "a.png"), (128, 128, 128), 1)


def test_inks_have_the_colours_of_their_profile(tmp_path: Path) -> None:
    """A printer's cyan and magenta are duller than a screen's: those of ISO 12647-2, by the formulas of CIE Lab."""
    profile = cmyk_profile({"": (100, 0, 0), "c": (55, -37, -50), "m": (48, 74, -3), "y": (89, -5, 93)})
    for name, ink in {"c.jpg": (255, 0, 0, 0), "m.tif": (0, 255, 0, 0)}.items():
        Image.new("CMYK", SIZE, ink).save(tmp_path / name, icc_profile=profile, quality=100)
    assert near(colour(tmp_path / "c.jpg"), (0, 151, 218), 4)
    assert near(colour(tmp_path / "m.tif"), (216, 11, 122), 4)
    Image.new("CMYK", SIZE, (255, 0, 0, 0)).save(tmp_path / "plain.jpg", quality=100)
    assert near(colour(tmp_path / "plain.jpg"), (0, 255, 255), 3)


def test_lab_is_shown_in_srgb(tmp_path: Path) -> None:
    Image.new("LAB", SIZE, (round(54.3 * 2.55), 81 + 128, 70 + 128)).save(tmp_path / "a.tif")  # red
    assert near(colour(tmp_path / "a.tif"), (255, 0, 0), 6)


def test_a_picture_of_srgb_stays_bit_by_bit(tmp_path: Path) -> None:
    """Also where its profile has other roundings than lcms's own."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for number, profile in enumerate((ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), SRGB)):
        Image.fromarray(noise).save(tmp_path / f"{number}.png", icc_profile=profile)
        shown = open_picture(tmp_path / f"{number}.png")
        assert (np.asarray(shown) == noise).all()
        assert shown.info == {}  # or what is drawn of it would be saved with the profile once more


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", b"no profile at all"),
        ("RGB", rgb_profile(ADOBE_RGB)[:200]),
        ("RGB", b""),
        ("RGB", gray_profile(1.0)),
        ("RGB", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()),
        ("CMYK", rgb_profile(ADOBE_RGB)),
    ],
    ids=["no profile", "cut off", "empty", "of grey", "of Lab", "of RGB in CMYK"],  # a made one holds the time
)
def test_a_profile_that_cannot_be_used_is_left_out(tmp_path: Path, mode: str, profile: bytes) -> None:
    Image.new("RGB", SIZE, GREEN).convert(mode).save(tmp_path / "a.jpg", icc_profile=profile, quality=100)
    assert near(colour(tmp_path / "a.jpg"), GREEN, 3)


@pytest.mark.parametrize(
    ("dtype", "white"),
    [
        (np.uint16, 65535),
        (np.int32, 2**31 - 1),
        (np.int32, 65535),
        (np.int32, 255),
        (np.float32, 1),
        (np.float32, 255),
        (np.float32, 65535),
    ],
)
def test_deep_greys_are_neither_black_nor_white(tmp_path: Path, dtype: Any, white: int) -> None:
    Image.fromarray((NUMBERS * white).astype(dtype)).save(tmp_path / "a.tif")
    shown = np.asarray(open_picture(tmp_path / "a.tif"))[..., 0] / 255
    assert np.abs(shown - NUMBERS).max() < 0.005


def tiff(values: np.ndarray, bits: int, form: int, meaning: int = 1) -> bytes:
    """As other programs write it: bits of a sample, its format (1: unsigned, 2: signed) and what 0 means."""
    height, width = values.shape
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: meaning, 273: 146, 277: 1, 278: height, 339: form}
    entries[279] = values.nbytes
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + table + bytes(4)
    return head.ljust(146, b"\0") + values.tobytes()


@pytest.mark.parametrize(
    ("dtype", "white", "form", "meaning"),
    [(np.uint32, 2**32 - 1, 1, 1), (np.int16, 2**15 - 1, 2, 1), (np.uint16, 2**16 - 1, 1, 0), (np.uint32, 65535, 1, 1)],
)
def test_deep_greys_of_other_programs(tmp_path: Path, dtype: Any, white: int, form: int, meaning: int) -> None:
    values = NUMBERS if meaning else 1 - NUMBERS
    data = tiff((values * white).astype(dtype), 8 * np.dtype(dtype).itemsize, form, meaning)
    (tmp_path / "a.tif").write_bytes(data)
    shown = np.asarray(open_picture(tmp_path / "a.tif"))[..., 0] / 255
    assert np.abs(shown - NUMBERS).max() < 0.005


def test_lights_above_white_are_white_and_the_rest_is_as_it_was(tmp_path: Path) -> None:
    values = (0.5 * NUMBERS).astype(np.float32)
    values[0, :3] = 7.5, np.inf, np.nan
    Image.fromarray(values).save(tmp_path / "a.tif")
    shown = np.asarray(open_picture(tmp_path / "a.tif"))[..., 0]
    assert shown[0, :3].tolist() == [255, 255, 0]
    assert shown[-1, -1] == 128


def chunk(name: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(values: np.ndarray, clear: int | None = None) -> bytes:
    """Of 16 bits of grey, of which one may be transparent."""
    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [
        (b"IHDR", struct.pack(">2I5B", width, height, 16, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    if clear is not None:
        parts.insert(1, (b"tRNS", struct.pack(">H", clear)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path: Path) -> None:
    values = np.full((8, 16), 250, np.uint16)
    (tmp_path / "a.png").write_bytes(png(values))
    (tmp_path / "a.tif").write_bytes(tiff(values, 16, 1))
    (tmp_path / "a.pgm").write_bytes(b"P5 16 8 65535\n" + values.astype(">u2").tobytes())
    assert [colour(tmp_path / f"a.{ending}") for ending in ("png", "tif", "pgm")] == [(1, 1, 1)] * 3


def test_the_transparent_grey_of_16_bits_is_white(tmp_path: Path) -> None:
    values = np.full((8, 16), 30_000, np.uint16)
    values[:, :8] = 777
    (tmp_path / "a.png").write_bytes(png(values, clear=777))
    picture, alpha = open_shown(tmp_path / "a.png")
    assert [picture.getpixel((x, 4)) for x in (2, 12)] == [(255,) * 3, (117,) * 3]
    assert alpha is not None
    assert [alpha.getpixel((x, 4)) for x in (2, 12)] == [0, 255]


def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")


@pytest.mark.parametrize(
    "broken",
    [
        entry(0x11A, 5, 1, struct.pack("<I", 44)),  # a resolution of 72 by 0, where 44 is
        entry(0x11A, 10, 1, struct.pack("<I", 44)),
        entry(0x11A, 2, 4, b"72\0\0"),
        entry(0x829A, 5, 900, struct.pack("<I", 44)),  # more exposure times than there are
        entry(0x829A, 5, 1, struct.pack("<I", 70_000)),
        entry(0x9999, 99, 7, b"\xff" * 4),
    ],
)
def test_broken_numbers_in_exif_do_not_hide_the_orientation(tmp_path: Path, broken: bytes) -> None:
    """Pillow 11.0 to 11.2 end in tracebacks where they write them anew."""
    orientation = entry(0x112, 3, 1, struct.pack("<H", 6))
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", 2) + orientation + broken + bytes(10) + struct.pack("<ii", -72, 0)
    Image.new("RGB", SIZE, GREEN).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
    assert open_picture(tmp_path / "a.jpg").size == (8, 16)


def test_exif_that_is_none_turns_nothing(tmp_path: Path) -> None:
    for number, exif in enumerate((b"Exif\0\0rubbish", b"Exif\0\0II*\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff")):
        Image.new("RGB", SIZE, GREEN).save(tmp_path / f"{number}.jpg", exif=exif)
        assert open_picture(tmp_path / f"{number}.jpg").size == SIZE


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
def test_orientation_counts_in_other_formats(tmp_path: Path, mode: str) -> None:
    """Turned to the left, what was left is below."""
    exif = Image.Exif()
    exif[0x112] = 8
    picture = Image.new("RGB", SIZE, "white")
    picture.paste("black", (0, 0, 8, 8))
    for name in ("a.tif", "a.jpg") if mode == "CMYK" else ("a.tif", "a.png", "a.webp"):
        picture.convert(mode).save(tmp_path / name, exif=exif)
        shown = open_picture(tmp_path / name)
        assert shown.size == SIZE[::-1]
        assert near(shown.getpixel((4, 2)), (255,) * 3)
        assert near(shown.getpixel((4, 13)), (0,) * 3, 3)


def test_alpha_is_turned_with_its_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 3
    picture = Image.new("RGBA", SIZE, (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 8, 8))
    picture.save(tmp_path / "a.png", exif=exif)
    _, alpha = open_shown(tmp_path / "a.png")
    assert alpha is not None
    assert [alpha.getpixel((x, 4)) for x in (2, 13)] == [255, 0]


@pytest.mark.parametrize("name", ["zTXt", "iTXt", "iCCP"])
def test_a_png_may_carry_more_than_a_megabyte_of_text_or_profile(tmp_path: Path, name: str) -> None:
    """As graphs and the prompts in them are."""
    data = io.BytesIO()
    Image.new("RGB", SIZE, GREEN).save(data, "PNG")
    content = bytes(3_000_000)
    if name == "iCCP":
        content = rgb_profile(ADOBE_RGB).ljust(3_000_000, b"\0")
        content = struct.pack(">I", len(content)) + content[4:]
    packed = zlib.compress(content)
    body = {"zTXt": b"workflow\0\0", "iTXt": b"workflow\0\1\0\0\0", "iCCP": b"icc\0\0"}[name] + packed
    whole = data.getvalue()
    (tmp_path / "a.png").write_bytes(whole[:33] + chunk(name.encode(), body) + whole[33:])  # behind the header
    assert near(colour(tmp_path / "a.png"), (41, 160, 60) if name == "iCCP" else GREEN, 3)


def test_of_what_moves_the_first_frame_is_seen(tmp_path: Path) -> None:
    frames = [Image.new("RGB", SIZE, shade) for shade in (GREEN, (255, 0, 0))]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert near(colour(tmp_path / name), GREEN, 3)


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "a.Apng", "a.tga", "a.jp2", "a.PPM", "a.dib"])
def test_other_endings_are_pictures_too(tmp_path: Path, name: str) -> None:
    Image.new("RGB", SIZE, GREEN).save(tmp_path / name)
    assert near(colour(tmp_path / name), GREEN, 3)


def test_the_content_counts_and_not_the_ending(tmp_path: Path) -> None:
    """Pictures of the web are often named otherwise; but what would run another program is no picture."""
    Image.new("RGB", SIZE, GREEN).save(tmp_path / "a.jpg", "WEBP", lossless=True)
    assert colour(tmp_path / "a.jpg") == GREEN
    Image.new("RGB", SIZE, GREEN).save(tmp_path / "b.png", "EPS")
    with pytest.raises(HollowError, match=r"b\.png cannot be read as a picture"):
        open_picture(tmp_path / "b.png")


def test_damaged_files_are_one_sentence_each(tmp_path: Path) -> None:
    """Empty ones, ends missing, and bytes changed at random: a picture, or a refusal, but no other error."""
    options: dict[str, Any] = {"icc_profile": rgb_profile(ADOBE_RGB), "exif": Image.Exif()}
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    random, refused = np.random.default_rng(1), 0
    for name in ("a.png", "a.jpg", "a.webp", "a.gif", "a.tif", "a.bmp", "a.jp2", "a.tga", "a.ppm"):
        noise.save(tmp_path / name, **(options if name[2:] in ("png", "jpg", "webp", "tif") else {}))
        whole = (tmp_path / name).read_bytes()
        for number in range(16):
            data = bytearray(whole)
            if number < 4:
                data = data[: len(data) * number // 5]
            else:
                for place in random.integers(0, min(len(data), 300), number):
                    data[place] = random.integers(256)
            (tmp_path / name).write_bytes(data)
            with suppress(HollowError):
                assert open_picture(tmp_path / name).mode == "RGB"
                continue
            refused += 1
    assert refused > 40


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", SIZE).save(tmp_path / "a.bmp")
    whole = (tmp_path / "a.bmp").read_bytes()
    (tmp_path / "a.bmp").write_bytes(whole[:18] + struct.pack("<ii", 20_000, 20_000) + whole[26:])
    with pytest.raises(HollowError, match=r"a\.bmp has too many pixels .*400000000.* Scale it down first"):
        open_picture(tmp_path / "a.bmp")
