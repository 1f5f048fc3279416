"""What the rows of all trials say: means, spreads, and differences between trials that share subject and seed."""

import re
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from statistics import mean, pstdev, stdev
from typing import NamedTuple

from hollow_core.demo import world

from .trial import Trial
from .ways import Way

Key = tuple[int, int]  # subject, seed


# Student's t for 95 % on both sides, by degrees of freedom; the six subjects have five
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57}


class Figure(NamedTuple):
    """Of the numbers of several trials."""

    mean: float
    spread: float
    """Their standard deviation."""
    error: float
    """The mean's standard error. Seeds of one subject are no strangers, so it is that of the subjects' means; of a
    single subject it is unknown, and infinite."""
    n: int
    """Trials."""
    subjects: int

    @classmethod
    def of(cls, values: Mapping[Key, float]) -> "Figure | None":
        """None of none."""
        if not values:
            return None
        by_subject: dict[int, list[float]] = {}
        for (subject, _), value in values.items():
            by_subject.setdefault(subject, []).append(value)
        means = [mean(numbers) for numbers in by_subject.values()]
        error = stdev(means) / len(means) ** 0.5 if len(means) > 1 else float("inf")
        return cls(mean(means), pstdev(values.values()), error, len(values), len(means))

    @property
    def interval(self) -> tuple[float, float]:
        """Where the mean is, to 95 %."""
        width = STUDENT[self.subjects - 1] * self.error if self.subjects > 1 else float("inf")
        return self.mean - width, self.mean + width


class Measured:
    """All trials of a folder that are done."""

    def __init__(self, out: Path, ways: Iterable[Way], subjects: Iterable[int], seeds: Iterable[int]) -> None:
        self._rows: dict[Way, dict[Key, Mapping[str, Mapping[str, float]]]] = {}
        for way, subject, seed in product(ways, subjects, seeds):
            trial = Trial(out, way, subject, seed)
            if trial.result.exists():
                self._rows.setdefault(way, {})[subject, seed] = trial.row()

    def values(self, way: Way, use: str, kind: str = "subject") -> dict[Key, float]:
        """One for each subject and seed."""
        return {key: row[use][kind] for key, row in self._rows.get(way, {}).items() if use in row}

    def figure(self, way: Way, use: str, kind: str = "subject") -> Figure | None:
        """Over all subjects and seeds."""
        return Figure.of(self.values(way, use, kind))

    def difference(
        self, way: Way, use: str, other: Way, other_use: str | None = None, kind: str = "subject"
    ) -> Figure | None:
        """Of `way` over `other`, where subject and seed are the same."""
        ours, theirs = self.values(way, use, kind), self.values(other, other_use or use, kind)
        return Figure.of({key: ours[key] - theirs[key] for key in ours.keys() & theirs.keys()})

    def by_subject(self, way: Way, use: str) -> dict[str, Figure]:
        """The subject score of each of them, over its seeds."""
        values = self.values(way, use)
        found = {
            subject.kind: Figure.of({key: value for key, value in values.items() if key[0] == number})
            for number, subject in enumerate(world.HELD_OUT)
        }
        return {kind: figure for kind, figure in found.items() if figure}


def plain(figure: Figure | None) -> str:
    """ ".786 ± .082"."""
    return "–" if figure is None else f"{short(figure.mean)} ± {short(figure.spread)}"


def signed(figure: Figure | None) -> str:
    """ "-.015 ± .021", the standard error."""
    if figure is None:
        return "–"
    error = "" if figure.subjects == 1 else f" ± {short(figure.error)}"
    return f"{'-' if figure.mean < 0 else '+'}{short(abs(figure.mean))}{error}"


def short(number: float) -> str:
    """Three places and no zero before the point."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{number:.3f}")
