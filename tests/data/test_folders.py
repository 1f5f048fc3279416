"""Pictures as people have them on the disk, and what is found there."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hollow_core.data.folders import buckets, load_pictures
from hollow_core.data.images import load_image, load_images, smaller
from hollow_core.data.prompts import Subject
from hollow_core.errors import HollowError


def put(path: Path, size: tuple[int, int] = (200, 200), color: str = "red", caption: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def test_kohyas_own_layout(tmp_path: Path) -> None:
    """As its guides draw it: img/ and reg/ side by side, "repeats_identifier class"."""
    put(tmp_path / "img" / "10_sks dog" / "a.png", caption="a sks dog, grass")
    put(tmp_path / "img" / "10_sks dog" / "b.jpg", (300, 150))
    put(tmp_path / "img" / "3_xyz tabby cat" / "c.png")
    put(tmp_path / "reg" / "1_dog" / "r.png")
    put(tmp_path / "reg" / "2_tabby cat" / "s.png")
    (tmp_path / "log").mkdir()
    found = load_pictures(tmp_path, 128)
    assert [(image.name, image.repeats, image.subject, image.caption) for image in found.images] == [
        ("a.png", 10, Subject("sks", "dog"), "a sks dog, grass"),
        ("b.jpg", 10, Subject("sks", "dog"), None),
        ("c.png", 3, Subject("xyz", "tabby cat"), None),
    ]
    assert [(image.name, image.repeats, image.subject) for image in found.of_class] == [
        ("r.png", 1, Subject("", "dog")),
        ("s.png", 2, Subject("", "tabby cat")),
    ]
    assert found.passed_over == []


def test_one_folder_with_others_in_it(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "old" / "b.png")
    put(tmp_path / "images" / "h.png")  # which counts where there are no pictures beside it
    put(tmp_path / "5_sks" / "c.png")
    put(tmp_path / "class" / "d.png", caption="a dog")
    put(tmp_path / ".cache" / "e.png")
    put(tmp_path / "0_off dog" / "f.png")
    found = load_pictures(tmp_path, 128)
    assert [(image.name, image.subject, image.repeats) for image in found.images] == [
        ("a.png", None, 1),
        ("c.png", Subject("sks", ""), 5),
    ]
    assert [(image.name, image.caption) for image in found.of_class] == [("d.png", "a dog")]
    assert found.passed_over == [tmp_path / "images", tmp_path / "old"]
    assert found.not_read == []

    # what is no picture, and what no caption was taken of
    put(tmp_path / "b.jfif", caption="a dog").with_suffix(".caption").write_text("another")
    for place in ("a.cr2", "notes.md", "typo.txt", "5_sks/c.jxl", "class/d.caption"):
        (tmp_path / place).touch()
    not_read = load_pictures(tmp_path, 128).not_read
    told = ["a.cr2", "b.caption", "notes.md", "typo.txt", "5_sks/c.jxl", "class/d.caption"]
    assert [path.relative_to(tmp_path).as_posix() for path in not_read] == told
    (tmp_path / "b.jfif").unlink()

    put(tmp_path / "elsewhere" / "g.png")
    found = load_pictures(tmp_path, 128, class_folder=tmp_path / "elsewhere")
    assert [image.name for image in found.of_class] == ["g.png"]


@pytest.mark.parametrize(
    ("folder", "class_folder", "said"),
    [
        ("missing", None, "missing does not exist. Give the folder"),
        (".", None, r"img holds no pictures\. Put four or five"),
        ("whole", "img", r"img holds no pictures\. Put some of the class there, or remove it\.$"),
        (
            "unnumbered",
            None,
            r"holds no pictures itself, but there are some in dog\. Give .*dog, or name such a folder",
        ),
        ("above", None, r"no pictures itself, but there are some in old, 2024/may\. Give .*old, or name such"),
        ("others", None, r"others holds no pictures\. Put four .*\.jpg\. What is there is not read: a\.psd, b\.jxl\.$"),
    ],
)
def test_empty_folders_are_told(tmp_path: Path, folder: str, class_folder: str | None, said: str) -> None:
    put(tmp_path / "whole" / "a.png")
    put(tmp_path / "unnumbered" / "dog" / "b.png")
    put(tmp_path / "above" / "2024" / "may" / "b.png")
    put(tmp_path / "above" / "old" / "b.png")
    (tmp_path / "others").mkdir()
    for name in ("a.psd", "b.jxl", "Thumbs.db", ".DS_Store"):
        (tmp_path / "others" / name).touch()
    (tmp_path / "img").mkdir()
    with pytest.raises(HollowError, match=said):
        load_pictures(tmp_path / folder, 128, class_folder=None if class_folder is None else tmp_path / class_folder)


def test_buckets_and_what_they_cost(tmp_path: Path) -> None:
    for name, size in {"wide": (640, 400), "wider": (660, 400), "high": (300, 460), "small": (64, 64)}.items():
        put(tmp_path / f"{name}.png", size)
    wide, square, high = buckets(load_images(tmp_path, 256))
    assert (wide.size, square.size, high.size) == ((320, 192), (256, 256), (192, 320))
    assert [image.name for image in wide.images] == ["wide.png", "wider.png"]
    assert square.enlarged == 4
    assert wide.cropped == pytest.approx(0.04, abs=0.01)
    for bucket in (wide, square, high):
        assert all(side % 64 == 0 for side in bucket.size)
        assert bucket.size[0] * bucket.size[1] == pytest.approx(256**2, rel=0.1)
    (only,) = buckets(load_images(tmp_path, 256, square=True))
    assert only.size == (256, 256)
    assert only.cropped == pytest.approx(1 - 400 / 660, abs=0.01)


def test_what_sdxl_is_told_of_a_crop(tmp_path: Path) -> None:
    """The rule of diffusers' own training script: the original's size, where the crop is in the picture as it was
    scaled, and the size that it has now."""
    image = load_image(put(tmp_path / "a.png", (1000, 400)), 256, square=True)
    scaled_width = round(1000 * 256 / 400)
    assert image.time_ids == (400, 1000, 0, (scaled_width - 256) // 2, 256, 256)
    assert smaller(image, 0.5).time_ids == (400, 1000, 0, (scaled_width - 256) // 4, 128, 128)
    assert load_image(put(tmp_path / "b.png", (100, 100)), 256).time_ids == (100, 100, 0, 0, 256, 256)


def test_a_smaller_twin_keeps_its_shape(tmp_path: Path) -> None:
    image = load_image(put(tmp_path / "a.png", (640, 400)), 256)
    half = smaller(image, 0.5)
    assert half.picture.size == (160, 96)
    odd = smaller(image, 0.3)
    assert odd.picture.size == (96, 56)
    left, top, right, bottom = odd.crop
    assert (right - left) / (bottom - top) == pytest.approx(96 / 56, rel=0.02)


def test_masks_lie_beside_pictures_or_in_their_alpha(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", (400, 200))
    mask = Image.new("L", (200, 100))
    mask.paste(255, (100, 0, 200, 100))
    mask.save(tmp_path / "a-mask.png")
    layer = Image.new("RGBA", (200, 200), (255, 0, 0, 255))
    layer.paste((0, 0, 0, 0), (0, 0, 200, 100))
    layer.save(tmp_path / "b.png")
    put(tmp_path / "lone-mask.png")
    a, b, lone = load_images(tmp_path, 256)
    assert (a.name, b.name, lone.name) == ("a.jpg", "b.png", "lone-mask.png")
    assert a.mask is not None
    assert a.mask.size == a.picture.size == (320, 192)
    values = np.asarray(a.mask)
    assert values[:, :155].max() == 0
    assert values[:, 165:].min() == 255
    assert b.mask is None
    b = load_images(tmp_path, 256, alpha_mask=True)[1]
    values = np.asarray(b.mask)
    assert values[:120].max() == 0
    assert values[136:].min() == 255
    assert b.picture.getpixel((64, 10)) == (255, 255, 255)  # transparency lies on white all the same


@pytest.mark.parametrize(
    ("size", "color", "said"),
    [
        ((200, 200), "black", "The mask of a.png is black all over. Paint white"),
        ((200, 100), "white", "Draw it on the"),
    ],
)
def test_a_mask_that_cannot_be_is_refused(tmp_path: Path, size: tuple[int, int], color: str, said: str) -> None:
    put(tmp_path / "a.png", (200, 200))
    put(tmp_path / "a-mask.png", size, color)
    with pytest.raises(HollowError, match=said):
        load_images(tmp_path, 128)
