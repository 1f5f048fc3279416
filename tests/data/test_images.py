"""Training pictures, from real files: what a viewer would show, cropped and never squashed."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hollow_core.data.images import fit, load_images, size_near
from hollow_core.errors import HollowError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)


def disc(width: int, height: int) -> Image.Image:
    """A red disc in the middle of a blue picture: squashing would make an ellipse of it."""
    picture = Image.new("RGB", (width, height), BLUE)
    radius = min(width, height) // 4
    x, y = width // 2, height // 2
    ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), fill=RED)
    return picture


def close(colour: tuple[int, ...], to: tuple[int, int, int], tolerance: int = 12) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(colour, to, strict=True))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (128, 128), (77, 513), (50, 40)])
def test_any_shape_is_cropped_never_squashed(tmp_path: Path, size: tuple[int, int]) -> None:
    disc(*size).save(tmp_path / "disc.png")
    (image,) = load_images(tmp_path, 128, square=True)
    assert image.picture.size == (128, 128)
    red = np.asarray(image.picture)[..., 0] > 128
    wide, high = red.any(0).sum(), red.any(1).sum()
    assert abs(int(wide) - int(high)) <= 4
    assert abs(int(wide) - 64) <= 8
    left, top, right, bottom = image.crop
    assert right - left == bottom - top == min(size)
    assert abs((left + right) - size[0]) <= 1
    assert abs((top + bottom) - size[1]) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(tmp_path: Path, orientation: int) -> None:
    """The same upright scene, stored in each of the eight ways that a camera may store it."""
    upright = Image.new("RGB", (96, 64), WHITE)
    ImageDraw.Draw(upright).rectangle((16, 0, 47, 31), fill=RED)
    ImageDraw.Draw(upright).rectangle((48, 32, 80, 63), fill=GREEN)
    stored_as = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(stored_as[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.jpg", exif=exif, quality=95, subsampling=0)

    (image,) = load_images(tmp_path, 64, square=True)
    assert image.crop == (16, 0, 80, 64)
    assert close(image.picture.getpixel((16, 16)), RED)
    assert close(image.picture.getpixel((48, 48)), GREEN)
    assert close(image.picture.getpixel((48, 16)), WHITE)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette"])
def test_transparency_is_laid_on_white(tmp_path: Path, kind: str) -> None:
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(picture).rectangle((32, 0, 63, 63), fill=(0, 0, 0, 255))
    if kind == "palette":
        picture.quantize(4).save(tmp_path / "a.png")
    else:
        picture.convert(kind).save(tmp_path / "a.png")
    (image,) = load_images(tmp_path, 64)
    assert image.picture.mode == "RGB"
    assert close(image.picture.getpixel((8, 32)), WHITE, 2)
    assert close(image.picture.getpixel((56, 32)), (0, 0, 0), 2)


def test_half_transparent_red_is_pink(tmp_path: Path) -> None:
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(tmp_path / "a.webp", lossless=True)
    (image,) = load_images(tmp_path, 64)
    assert close(image.picture.getpixel((32, 32)), (255, 127, 127), 3)


def test_other_pixel_formats(tmp_path: Path) -> None:
    """16-bit grey, CMYK and one-bit pictures keep their brightness."""
    Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(tmp_path / "a.png")
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "b.tif")
    Image.new("1", (64, 64), 1).save(tmp_path / "c.bmp")
    grey, red, white = (image.picture.getpixel((9, 9)) for image in load_images(tmp_path, 64))
    assert close(grey, (156, 156, 156), 2)
    assert close(red, RED)
    assert close(white, WHITE, 0)


def test_captions_and_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpeg", ".hidden.png"):
        disc(64, 64).save(tmp_path / name)
    (tmp_path / "b.txt").write_text("\ufeff a sks cup on grass\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("\n")
    (tmp_path / "notes.md").write_text("not a picture")
    images = load_images(tmp_path, 64)
    assert [(image.name, image.caption) for image in images] == [
        ("a.jpeg", None),
        ("b.PNG", "a sks cup on grass"),
    ]


def refusal(folder: Path, resolution: int = 512) -> str:
    with pytest.raises(HollowError) as refused:
        load_images(folder, resolution)
    return str(refused.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "holds no pictures. Put four or five of your subject there" in refusal(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "my pictures does not exist. Give the folder" in refusal(tmp_path / "my pictures")


def test_a_file_for_a_folder_is_refused(tmp_path: Path) -> None:
    disc(64, 64).save(tmp_path / "a.png")
    assert "a.png is a file, not a folder. Give the folder" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "photo.HEIC"])
def test_a_text_file_named_as_a_picture_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("this is not a picture")
    assert f"{name} cannot be read as a picture. Remove it" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif"])
def test_a_truncated_picture_is_refused(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert f"{name} cannot be read as a picture" in refusal(tmp_path)


def test_a_one_pixel_picture_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    assert "dot.png is only 1×1 pixels. Take a picture of at least 64 pixels a side" in refusal(tmp_path)


def test_a_strange_resolution_is_refused(tmp_path: Path) -> None:
    assert "The resolution 500 is no multiple of 8" in refusal(tmp_path, 500)


def test_a_caption_that_is_no_text_is_refused(tmp_path: Path) -> None:
    disc(64, 64).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    assert "a.txt is no readable text. Save it as UTF-8" in refusal(tmp_path, 64)


@pytest.mark.parametrize("resolution", [64, 512, 768, 1024])
def test_pictures_that_keep_their_shape_lose_little(resolution: int) -> None:
    """Every camera's and phone's shape, and any between 2:1 and 1:2, upright and across."""
    shapes = [(4032, 3024), (6000, 4000), (1920, 1080), (3000, 3000), *((100 + 7 * step, 100) for step in range(15))]
    for wide, high in shapes:
        size = size_near(wide, high, resolution)
        assert size == size_near(high, wide, resolution)[::-1]
        assert all(side % (64 if resolution > 64 else 8) == 0 for side in size)
        assert abs(size[0] * size[1] / resolution**2 - 1) <= 0.1
        assert min(wide * size[1], high * size[0]) / max(wide * size[1], high * size[0]) > 0.87


def test_sizes_are_those_that_people_know() -> None:
    assert size_near(3000, 3000, 512) == (512, 512)
    assert size_near(4032, 3024, 512) == (576, 448)
    assert size_near(1080, 1920, 1024) == (768, 1344)
    assert size_near(10_000, 1000, 1024) == (2048, 512)  # a panorama is cropped to four to one
    assert size_near(6000, 4000, 64) == (80, 56)  # the embedded model's


@pytest.mark.parametrize("size", [(640, 448), (448, 640), (640, 384)])
def test_a_picture_that_keeps_its_shape_is_not_squashed(size: tuple[int, int]) -> None:
    image = fit(disc(600, 437), size, "disc.png")
    assert image.picture.size == size
    red = np.asarray(image.picture)[..., 0] > 128
    assert abs(int(red.any(0).sum()) - int(red.any(1).sum())) <= 4


@pytest.mark.parametrize("resolution", [0, 500, 520])
def test_a_resolution_off_the_grid_is_refused_where_shapes_are_kept(resolution: int) -> None:
    with pytest.raises(HollowError, match=rf"The resolution {resolution} is no multiple of 64 pixels.* or crop them"):
        size_near(640, 480, resolution)


def test_a_small_picture_is_refused_by_the_side_that_lacks() -> None:
    with pytest.raises(
        HollowError, match=r"rex.jpg is only 300×50 pixels. Take a picture of at least 56 pixels a side"
    ):
        fit(disc(300, 50), (576, 448), "rex.jpg")
