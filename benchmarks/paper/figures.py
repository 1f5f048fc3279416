"""What the rows of all trials say: means, spreads, and differences between trials that share subject and seed."""

import re
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from statistics import mean, pstdev, stdev
from typing import NamedTuple

from .trial import Trial
from .ways import Way

NOT_MEASURED = "–"

Key = tuple[int, int]  # subject, seed
Row = Mapping[str, Mapping[str, float]]  # {use: {kind of score: score}}

# Student's t for 95 % on both sides, from one degree of freedom on; the thirty subjects have 29
STUDENT = (
    *(12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13),
    *(2.12, 2.11, 2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05),
)


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
        width = STUDENT[self.subjects - 2] * self.error if self.subjects > 1 else float("inf")
        return self.mean - width, self.mean + width


class Measured:
    """What trials have measured."""

    def __init__(self, rows: Mapping[Way, Mapping[Key, Row]]) -> None:
        self._rows = rows

    @classmethod
    def read(cls, out: Path, ways: Iterable[Way], subjects: Iterable[int], seeds: Iterable[int]) -> "Measured":
        """All trials of a folder that are done."""
        rows: dict[Way, dict[Key, Row]] = {}
        for way, subject, seed in product(ways, subjects, seeds):
            trial = Trial(out, way, subject, seed)
            if trial.result.exists():
                rows.setdefault(way, {})[subject, seed] = trial.row()
        return cls(rows)

    def shared(self, ways: Iterable[Way]) -> "Measured":
        """The trials of subjects and seeds that all of `ways` have, so that their means can be compared; a way that
        has none yet is passed over."""
        rows = {way: self._rows[way] for way in ways if way in self._rows}
        keys = set[Key].intersection(*(set(of_way) for of_way in rows.values())) if rows else set()
        return Measured({way: {key: of_way[key] for key in sorted(keys)} for way, of_way in rows.items()})

    def having(self, way: Way, use: str) -> "Measured":
        """The trials of subjects and seeds of which a way is measured in a use that not all have."""
        there = self.values(way, use)
        return Measured(
            {way: {key: row for key, row in rows.items() if key in there} for way, rows in self._rows.items()}
        )

    @property
    def keys(self) -> list[Key]:
        """The subjects and seeds that any way has."""
        return sorted({key for of_way in self._rows.values() for key in of_way})

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

    def part(self, *, subject: int | None = None, seed: int | None = None) -> "Measured":
        """The trials of a subject, or of a seed."""
        return Measured(
            {
                way: {key: row for key, row in rows.items() if subject in (None, key[0]) and seed in (None, key[1])}
                for way, rows in self._rows.items()
            }
        )


def plain(figure: Figure | None) -> str:
    """ ".786 ± .082"."""
    return NOT_MEASURED if figure is None else f"{short(figure.mean)} ± {short(figure.spread)}"


def signed(figure: Figure | None) -> str:
    """ "-.015 ± .021", the standard error."""
    if figure is None:
        return NOT_MEASURED
    error = "" if figure.subjects == 1 else f" ± {short(figure.error)}"
    return f"{'-' if figure.mean < 0 else '+'}{short(abs(figure.mean))}{error}"


def short(number: float) -> str:
    """Three places and no zero before the point."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{number:.3f}")
