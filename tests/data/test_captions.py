"""How captions change from record to record."""

from itertools import islice

import pytest
import torch

from hollow_core.data.captions import CaptionChanges
from hollow_core.errors import HollowError

CAPTION = "a sks dog, grass, sun, ball, tree"


def drawn(changes: CaptionChanges, number: int, seed: int = 0) -> list[str]:
    return list(islice(changes.of(CAPTION, torch.Generator().manual_seed(seed)), number))


def test_by_default_they_stay() -> None:
    assert drawn(CaptionChanges(), 3) == [CAPTION] * 3
    assert not CaptionChanges().any


def test_tags_are_shuffled_behind_those_that_are_kept() -> None:
    changed = drawn(CaptionChanges(shuffle_tags=True, keep_tags=2), 50)
    assert all(each.startswith("a sks dog, grass, ") for each in changed)
    assert all(sorted(each.split(", ")) == sorted(CAPTION.split(", ")) for each in changed)
    assert len(set(changed)) == 6
    assert changed == drawn(CaptionChanges(shuffle_tags=True, keep_tags=2), 50)
    assert changed != drawn(CaptionChanges(shuffle_tags=True, keep_tags=2), 50, seed=1)


def test_some_are_dropped() -> None:
    changed = drawn(CaptionChanges(dropout=0.3), 1000)
    assert set(changed) == {CAPTION, ""}
    assert changed.count("") / 1000 == pytest.approx(0.3, abs=0.05)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(HollowError, match=r"The caption dropout is 10\. Give a share from 0 to 1"):
        CaptionChanges(dropout=10)
    with pytest.raises(HollowError, match=r"keep_tags is -1\. It must be 0 or more"):
        CaptionChanges(keep_tags=-1)
