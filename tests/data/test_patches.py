"""Dynamic patches: how large, and where; what a crop shows is what lies at its place in the smaller whole."""

import pytest
import torch
from PIL import Image

from hollow_core.data.images import TrainingImage
from hollow_core.data.patches import Place, check_patches, patch, side_at
from hollow_core.errors import HollowError


def ramp(width: int, height: int) -> TrainingImage:
    """Its red is the column, its green the row, as a share of the sides."""
    picture = Image.merge(
        "RGB",
        [
            Image.linear_gradient("L").rotate(90).resize((width, height), Image.Resampling.BILINEAR),
            Image.linear_gradient("L").resize((width, height), Image.Resampling.BILINEAR),
            Image.new("L", (width, height)),
        ],
    )
    return TrainingImage(picture, None, "ramp.png", (0, 0, width, height))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sides_are_the_papers() -> None:
    """From 256 without noise to 512 with nothing else, in steps of 16."""
    sides = [side_at(t / 1000, 256, 512) for t in range(1001)]
    assert sides == sorted(sides)
    assert set(sides) == set(range(256, 513, 16))
    assert (sides[0], sides[500], sides[1000]) == (256, 384, 512)
    assert {side_at(t / 100, 32, 64) for t in range(101)} == set(range(32, 65, 2))
    assert side_at(1.0, 256, 500) == 500


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.8, 1.0])
def test_a_crop_is_the_smaller_whole_at_its_place(noise: float) -> None:
    """At most half a token beside it."""
    whole = ramp(640, 384)
    for seed in range(8):
        small, place = patch(whole, noise, 256, 16, seeded(seed))
        assert small.picture.size == (256, 256)
        factor = 256 / side_at(noise, 256, 384)
        size = round(640 * factor), round(384 * factor)
        there = whole.picture.resize(size, Image.Resampling.LANCZOS)
        left, top = 16 * place.column, 16 * place.row
        assert left + 256 <= 16 * place.columns
        assert top + 256 <= 16 * place.rows
        assert (place.columns, place.rows) == (round(size[0] / 16), round(size[1] / 16))
        for x, y in ((8, 8), (128, 128), (248, 248)):
            expected = there.getpixel((min(left + x, size[0] - 1), min(top + y, size[1] - 1)))
            found = small.picture.getpixel((x, y))
            assert all(abs(a - b) <= 9 * 256 / min(size) for a, b in zip(found, expected, strict=True))  # type: ignore[arg-type]


def test_much_noise_sees_the_whole_and_little_noise_its_own_size() -> None:
    whole = ramp(512, 512)
    assert patch(whole, 1.0, 256, 16, seeded(0))[1] == Place(0, 0, 16, 16)
    small, place = patch(whole, 0.0, 256, 16, seeded(0))
    left, top = 16 * place.column, 16 * place.row
    assert small.picture.tobytes() == whole.picture.crop((left, top, left + 256, top + 256)).tobytes()
    assert small.time_ids == (512, 512, top, left, 256, 256)
    places = {patch(whole, 0.0, 256, 16, seeded(seed))[1].row for seed in range(200)}
    assert places == set(range(17))  # everywhere, to both ends
    assert patch(whole, 0.4, 256, 16, seeded(3))[1] == patch(whole, 0.4, 256, 16, seeded(3))[1]


def test_sdxl_is_told_of_a_crop_of_a_crop() -> None:
    """In pixels of the original, scaled as the patch is; within one, as crops are whole pixels."""
    whole = ramp(640, 512)._replace(crop=(100, 40, 1380, 1064), whole=(1480, 1100))  # learned at half its size
    small, place = patch(whole, 0.5, 256, 16, seeded(1))
    factor = 256 / 384
    assert small.whole == (1480, 1100)
    height, width, top, left, *target = small.time_ids
    assert (height, width, target) == (1100, 1480, [256, 256])
    assert abs(top - (16 * place.row + 20 * factor)) <= 1
    assert abs(left - (16 * place.column + 50 * factor)) <= 1


def test_a_mask_goes_along_and_something_of_it_is_in_every_crop() -> None:
    mask = Image.new("L", (512, 512))
    mask.paste(255, (10, 20, 40, 50))
    for seed in range(20):
        small, place = patch(ramp(512, 512)._replace(mask=mask), 0.0, 256, 16, seeded(seed))
        assert small.mask is not None
        assert small.mask.size == (256, 256)
        assert small.mask.getbbox() is not None
        assert place.row <= 3


@pytest.mark.parametrize(
    ("side", "size", "said"),
    [
        (250, (512, 512), "The side of patches, 250, is no multiple of 16 pixels."),
        (0, (512, 512), "no multiple of 16"),
        (256, (512, 256), "Patches of 256 pixels are not smaller than a picture of 512×256."),
    ],
)
def test_patches_that_cannot_be_are_refused(side: int, size: tuple[int, int], said: str) -> None:
    with pytest.raises(HollowError, match=said):
        check_patches(side, size, 16)
