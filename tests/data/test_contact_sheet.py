"""The contact sheet, looked at by its pixels."""

import numpy as np
import pytest
from PIL import Image

from hollow_core.data.contact_sheet import CELL, COLUMNS, GAP, LINE, cell, contact_sheet
from hollow_core.data.images import fit

RED = (255, 0, 0)


def sheet(*shapes: tuple[int, int], caption: str = "a photo of a sks dog", side: int = 64) -> np.ndarray:
    """Of red pictures, cropped to squares."""
    wholes = [Image.new("RGB", shape, RED) for shape in shapes]
    return np.asarray(contact_sheet([cell(whole, fit(whole, (side, side), "a"), caption) for whole in wholes]))


def below(sheet: np.ndarray) -> np.ndarray:
    """The text below the first picture."""
    return sheet[GAP + CELL : GAP + CELL + 3 * LINE, GAP : GAP + CELL]


def test_what_the_crop_takes_away_is_shown_dimmed() -> None:
    """A picture twice as wide as high loses a quarter at each end, and is not squashed."""
    row = sheet((400, 200))[GAP + CELL // 2]
    red, dimmed = (row == RED).all(-1), (row != RED).any(-1) & (row != 255).any(-1)
    assert abs(red.sum() - CELL // 2) <= 2
    assert abs(dimmed[: GAP + CELL // 2].sum() - CELL // 4) <= 2
    assert abs(dimmed[GAP + CELL // 2 :].sum() - CELL // 4) <= 2


def test_caption_and_size_are_below_the_picture() -> None:
    without = below(sheet((64, 64), caption=""))
    text = below(sheet((64, 64)))
    assert (without[: 2 * LINE] == 255).all()
    assert (without[2 * LINE :] != 255).any()  # its size
    assert (text[: 2 * LINE] != 255).any()


@pytest.mark.parametrize("caption", ["a photo of a sks dog, " * 20, "W" * 400, "犬" * 400])
def test_a_long_caption_stays_below_its_picture(caption: str) -> None:
    two = sheet((64, 64), (64, 64), caption=caption)
    assert (below(two)[: 2 * LINE] != 255).any()
    assert (two[GAP + CELL :, GAP + CELL : 2 * GAP + CELL] == 255).all()


def test_letters_beyond_english_are_drawn_each_as_its_own() -> None:
    e, a = below(sheet((64, 64), caption="é")), below(sheet((64, 64), caption="ä"))
    assert (e != a).any()


def test_an_enlarged_picture_is_marked() -> None:
    def coloured(text: np.ndarray) -> bool:
        return bool((text.max(-1).astype(int) - text.min(-1) > 60).any())

    assert coloured(below(sheet((64, 64), side=128)))
    assert not coloured(below(sheet((128, 128), side=128)))


def test_many_pictures_are_counted_not_drawn() -> None:
    twelve, more = sheet(*[(64, 64)] * 12), sheet(*[(64, 64)] * 24)
    assert (more[: len(twelve)] == twelve).all()
    assert (more[len(twelve) :] != 255).any()
    assert more.shape == sheet(*[(64, 64)] * 300).shape
    assert twelve.shape[1] == GAP + COLUMNS * (CELL + GAP)


@pytest.mark.parametrize("shape", [(3000, 8), (8, 3000), (1, 1)])
def test_a_strange_shape_is_drawn(shape: tuple[int, int]) -> None:
    assert (sheet(shape, side=8) != 255).any()


def test_what_a_mask_hides_is_shown_dimmed() -> None:
    whole, mask = Image.new("RGB", (200, 200), RED), Image.new("L", (200, 200), 255)
    mask.paste(0, (0, 0, 100, 200))
    image = fit(whole, (64, 64), "a", mask=mask)
    row = np.asarray(contact_sheet([cell(whole, image, "")]))[GAP + CELL // 2, GAP : GAP + CELL]
    assert (row[CELL // 2 + 8 :] == RED).all()
    assert (row[: CELL // 2 - 8] != RED).any(-1).all()


def test_a_sheet_can_hold_all() -> None:
    whole = Image.new("RGB", (64, 64), RED)
    cells = [cell(whole, fit(whole, (64, 64), "a"), "")] * 14
    assert contact_sheet(cells, most=14).height > contact_sheet(cells).height


def test_a_note_stands_below_all_in_as_many_lines_as_it_takes() -> None:
    whole = Image.new("RGB", (64, 64), RED)
    cells = [cell(whole, fit(whole, (64, 64), "a"), "")]
    plain, short, long = (
        np.asarray(contact_sheet(cells, note)) for note in ("", "Captions for 0 of 1", "Not read: notes.md. " * 4)
    )
    assert len(plain) < len(short) < len(long)
    for sheet in (short, long):
        assert (sheet[: len(plain)] == plain).all()
        assert (sheet[len(plain) :] != 255).any()
        assert (sheet[:, -GAP:] == 255).all()
