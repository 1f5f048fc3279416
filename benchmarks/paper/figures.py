"""What the rows of all trials say: means, spreads, and differences between trials that share subject and seed."""

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from statistics import mean, pstdev, stdev
from typing import NamedTuple

from hollow_core.demo import world

from .trial import Trial
from .ways import Way

Key = tuple[int, int]  # subject, seed


class Figure(NamedTuple):
    """Of several numbers."""

    mean: float
    spread: float
    """Their standard deviation."""
    error: float
    """The mean's standard error; that of a single number is unknown, and infinite."""
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Figure | None":
        """None of none."""
        numbers = list(values)
        if not numbers:
            return None
        error = stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else float("inf")
        return cls(mean(numbers), pstdev(numbers), error, len(numbers))


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
        return Figure.of(self.values(way, use, kind).values())

    def difference(
        self, way: Way, use: str, other: Way, other_use: str | None = None, kind: str = "subject"
    ) -> Figure | None:
        """Of `way` over `other`, where subject and seed are the same."""
        ours, theirs = self.values(way, use, kind), self.values(other, other_use or use, kind)
        return Figure.of(ours[key] - theirs[key] for key in ours.keys() & theirs.keys())

    def by_subject(self, way: Way, use: str) -> dict[str, Figure]:
        """The subject score of each of them, over its seeds."""
        found: dict[str, list[float]] = {}
        for (subject, _), value in self.values(way, use).items():
            found.setdefault(world.HELD_OUT[subject].kind, []).append(value)
        return {kind: figure for kind, values in found.items() if (figure := Figure.of(values))}


def plain(figure: Figure | None) -> str:
    """ ".786 ± .082"."""
    return "–" if figure is None else f"{short(figure.mean)} ± {short(figure.spread)}"


def signed(figure: Figure | None) -> str:
    """ "-.015 ± .021", the standard error."""
    if figure is None:
        return "–"
    error = "" if figure.n == 1 else f" ± {short(figure.error)}"
    return f"{'-' if figure.mean < 0 else '+'}{short(abs(figure.mean))}{error}"


def short(number: float) -> str:
    """Three places and no zero before the point."""
    return f"{number:.3f}".replace("0.", ".", 1)
