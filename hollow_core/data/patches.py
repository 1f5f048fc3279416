"""Dynamic patches: of a noisy picture the whole, made small; of a nearly clean one a small crop at its own size.

DiT-BlockSkip, CVPR 2026, arXiv 2603.20755: at noise level t a crop of side s(t) = s_min + (t / T) (s_max − s_min),
resized to s_min.
"""

import math
from typing import NamedTuple

import torch
from PIL import Image

from ..errors import HollowError
from .images import TrainingImage


class Place(NamedTuple):
    """Where a crop is in the whole picture, which is as much smaller as the crop is; in tokens."""

    row: int
    column: int
    rows: int
    """Of the whole."""
    columns: int
    """Of the whole."""


def side_at(noise: float, least: int, most: int) -> int:
    """s(t) in pixels at `noise` from 0 to 1: from `least` to `most`, in steps of 16, or of a sixteenth of `least`."""
    step = max(min(least // 16, 16), 1)
    return min(least + round(noise * math.ceil((most - least) / step)) * step, most)


def patch(
    image: TrainingImage, noise: float, side: int, grid: int, generator: torch.Generator
) -> tuple[TrainingImage, Place]:
    """A square of the picture with the side s(t), `side` for s_min and the shorter side of the picture for s_max,
    resized to `side`; anywhere in it, but of a picture with a mask never where all is black. Its place is in tokens of
    `grid` pixels, and whole but for crops at the right and lower ends.
    """
    width, height = image.picture.size
    taken = side_at(noise, side, min(width, height))
    while True:
        left, column, columns = _place(width, taken, side, grid, generator)
        top, row, rows = _place(height, taken, side, grid, generator)
        box = (left, top, left + taken, top + taken)
        if image.mask is None or image.mask.crop(_outer(box)).getbbox():
            break
    scale = (image.crop[2] - image.crop[0]) / width
    a, b, c, d = (round(start + edge * scale) for start, edge in zip(image.crop[:2] * 2, box, strict=True))
    small = image._replace(
        picture=image.picture.resize((side, side), Image.Resampling.LANCZOS, box=box),
        mask=image.mask and image.mask.resize((side, side), Image.Resampling.BILINEAR, box=box),
        crop=(a, b, c, d),
        whole=image.original,
    )
    return small, Place(row, column, rows, columns)


def check_patches(side: int, size: tuple[int, int], grid: int) -> None:
    """Raises HollowError for patches that are not smaller than a picture of `size`, and for a side that is no multiple
    of `grid` pixels."""
    if side < 1 or side % grid:
        raise HollowError(f"The side of patches, {side}, is no multiple of {grid} pixels. Take 256 or 512.")
    if side >= min(size):
        raise HollowError(
            f"Patches of {side} pixels are not smaller than a picture of {size[0]}×{size[1]}. Take half of the "
            "resolution."
        )


def _place(whole: int, taken: int, side: int, grid: int, generator: torch.Generator) -> tuple[float, int, int]:
    """Where along a side a crop begins, in pixels and in tokens, and how many tokens the whole has."""
    token = grid * taken / side  # in pixels of the picture
    last = (whole - taken) / token
    number = int(torch.rand((), generator=generator, dtype=torch.float64).item() * (math.ceil(last) + 1))
    start = min(number, last)
    return start * token, math.floor(start + 0.5), side // grid + math.floor(last + 0.5)


def _outer(box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    """The whole pixels that a box touches."""
    left, top, right, bottom = box
    return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
