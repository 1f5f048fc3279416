"""The judge that nobody trained, against pictures of which the truth is known."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from benchmarks.independent import likeness
from hollow_core.demo import world


@pytest.mark.parametrize("subject", world.HELD_OUT[::7])
def test_a_subject_is_found_wherever_it_stands_and_told_from_others(subject: world.Subject) -> None:
    choose = random.Random(0)
    real = likeness([world.draw(subject, scene, choose) for scene in world.NEW_SCENES], subject)
    assert min(real) > 0.8
    strangers = [replace(world.random_subject(choose), kind=subject.kind) for _ in range(6)]
    others = likeness([world.draw(stranger, "night", choose) for stranger in strangers], subject)
    assert max(others) < 0.7
    empty = likeness([Image.new("RGB", (world.SIZE, world.SIZE), "gray")], subject)
    assert max(empty) < 0.5


def test_colour_and_shape_are_told_apart() -> None:
    """A gray picture keeps the shape, a mirrored one the colours."""
    subject = world.HELD_OUT[12]  # a dog, which looks to one side
    drawn = world.draw(subject, "snow", random.Random(1))
    real = likeness([drawn], subject)
    gray = likeness([ImageOps.grayscale(drawn).convert("RGB")], subject)
    mirrored = likeness([ImageOps.mirror(drawn)], subject)
    assert gray.colour < 0.5 < gray.shape
    assert mirrored.colour > mirrored.shape
    assert mirrored.shape < real.shape - 0.2


def test_a_cutout_is_the_subject_without_any_ground() -> None:
    for subject in world.HELD_OUT:
        picture, mask = world.cutout(subject, 40)
        covered = np.asarray(mask) == 255
        assert 0.1 < covered.mean() < 0.5
        drawn = np.asarray(picture)
        assert (drawn[~covered] == 255).all(-1).mean() > 0.8  # but for edges, white ground
        assert not covered[0].any()
        assert not covered[:, 0].any()
        assert not covered[:, -1].any()
