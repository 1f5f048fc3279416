"""A grid shows every picture whole, and every word."""

import numpy as np
from PIL import Image

from hollow_core.data.grid import CELL, GAP, Row, font, grid, wrapped

RED, BLUE = (200, 0, 0), (0, 0, 200)


def boxes(sheet: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Where a colour is: left, top, right, bottom."""
    down, across = np.nonzero((np.asarray(sheet) == color).all(-1))
    return across.min(), down.min(), across.max() + 1, down.max() + 1


def test_pictures_keep_their_shapes_and_stand_below_one_another() -> None:
    wide, small = Image.new("RGB", (1024, 512), RED), Image.new("RGBA", (100, 50), BLUE)
    sheet = grid([Row("first", [wide, wide], titles=["a dog\nseed 0", "a cat\nseed 1"]), Row("second", [small])])
    red, blue = boxes(sheet, RED), boxes(sheet, BLUE)
    assert (red[2] - red[0], red[3] - red[1]) == (2 * CELL + GAP, CELL // 2)
    assert (blue[2] - blue[0], blue[3] - blue[1]) == (200, 100)  # twice, so that pixels can be seen
    assert blue[:2] == (red[0], red[3] + GAP)
    assert sheet.mode == "RGB"


def test_long_names_are_wrapped_and_whole() -> None:
    picture = Image.new("RGB", (64, 64), RED)
    short, long = grid([Row("a", [picture])]), grid([Row("my-dog-" * 40, [picture])])
    assert long.width < short.width + 250
    assert long.height > short.height
    for text in ("a photo of a sks dog in the snow of Patagonia", "x" * 90, "犬の写真" * 20):
        lines = wrapped(text, 150, font(15))
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert max(font(15).getlength(line) for line in lines) <= 150
        assert len(lines) > 1
