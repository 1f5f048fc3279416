"""What the front end's scripts must know as Python does."""

import re
from pathlib import Path

from hollow_core.data.picture_file import SUFFIXES

SCRIPT = Path(__file__).parents[2] / "nodes" / "web" / "load_pictures.js"


def test_the_same_files_are_uploaded_that_count_as_pictures() -> None:
    [suffixes] = re.findall(r"PICTURE = /\\\.\((.+)\)\$/i", SCRIPT.read_text())
    assert tuple(f".{suffix}" for suffix in suffixes.split("|")) == SUFFIXES
