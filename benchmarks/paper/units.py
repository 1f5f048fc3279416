"""What one process of many does at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from .baselines import Diverged
from .trial import Extent, Trial, run_trial
from .ways import Way


class Unit(NamedTuple):
    """Trainings of a subject, which share its class pictures and records."""

    ways: Sequence[Way]
    subject: int
    seed: int


def run_unit(out: Path, unit: Unit, extent: Extent) -> int:
    """How many ways it has."""
    for way in unit.ways:
        try:
            run_trial(Trial(out, way, unit.subject, unit.seed), extent)
        except Diverged as error:
            tqdm.write(f"Without a row: {error}")
    return len(unit.ways)
