"""What a measurement is, where its figures are kept, and what is said of them."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hollow_core.files import read_json

Figures = dict[str, Any]
"""JSON-ready: numbers by name and unit, "train, GiB"; None where this device has none. What has its name in brackets is
not in the table."""


class Goal(NamedTuple):
    """What stands beside a figure."""

    beside: str
    met: bool | None
    """None: there is nothing to meet."""
    missed_by: str = ""


@dataclass(frozen=True)
class Found:
    """What is measured and predicted so far: a JSON file each, by the measurement's name."""

    folder: Path

    def path(self, name: str) -> Path:
        """Of its figures."""
        return self.folder / f"{_file(name)}.json"

    def predicted_path(self, name: str) -> Path:
        """Of what a dry run says of them."""
        return self.folder / "predicted" / f"{_file(name)}.json"

    def trouble_path(self, name: str) -> Path:
        """Of the traceback, where it failed."""
        return self.folder / "trouble" / f"{_file(name)}.txt"

    def figures(self, name: str) -> Figures:
        """Empty where nothing is measured yet."""
        return _read(self.path(name))

    def predicted(self, name: str) -> Figures:
        """Empty where nothing is predicted, or not yet."""
        return _read(self.predicted_path(name))


Goals = Callable[[str, Found], dict[str, Goal]]
"""The goals of a measurement's figures, by their names, given its own."""


@dataclass(frozen=True)
class Measurement:
    """Something to know of a GPU."""

    name: str
    measure: Callable[[torch.device], Figures]
    goals: tuple[Goals, ...] = ()
    predict: Callable[[], Figures] | None = None
    """What dry runs say of figures of the same names; runs in another process."""

    def lines(self, found: Found) -> Iterator[str]:
        """The table's, one a figure."""
        goals = {figure: goal for of in self.goals for figure, goal in of(self.name, found).items()}
        shown = {figure: value for figure, value in found.figures(self.name).items() if not figure.startswith("(")}
        for figure, value in shown.items():
            goal = goals.get(figure, Goal("", None))
            verdict = {None: "", True: "✓", False: f"✗ by {goal.missed_by}"}[goal.met]
            yield f"| {self.name} | {figure} | {_shown(value)} | {goal.beside} | {verdict} |"


HEAD = "| measurement | figure | is | goal | |\n|---|---|---|---|---|"


def near_prediction(name: str, found: Found) -> dict[str, Goal]:
    """Each figure that is predicted is within 5 % of that."""
    figures, goals = found.figures(name), {}
    for figure, predicted in found.predicted(name).items():
        goals[figure] = Goal(f"predicted {predicted:.3f}", None)
        if predicted and figures.get(figure) is not None:
            off = figures[figure] / predicted - 1
            beside = f"predicted {predicted:.3f}: {100 * off:+.1f} %"
            goals[figure] = Goal(beside, abs(off) <= 0.05, f"{100 * abs(off) - 5:.1f} %")
    return goals


def at_most(figure: str, times: float | None, of: str) -> Goals:
    """That figure is at most so many times another measurement's of the same name; None: the ratio alone."""

    def goal(name: str, found: Found) -> dict[str, Goal]:
        mine, other = (found.figures(each).get(figure) for each in (name, of))
        if mine is None or other is None:
            return {}
        ratio = mine / other
        if times is None:
            return {figure: Goal(f"{ratio:.2f} of {of}", None)}
        beside = f"{ratio:.2f} of {of}, at most {times:.2f}"
        return {figure: Goal(beside, ratio <= times, f"{ratio - times:.2f}")}

    return goal


def within(expected: Mapping[str, float], tolerance: float) -> Goals:
    """Each of these figures is as expected, but for so much."""

    def goal(name: str, found: Found) -> dict[str, Goal]:
        figures = found.figures(name)
        off = {
            figure: abs(figures[figure] - value)
            for figure, value in expected.items()
            if figures.get(figure) is not None
        }
        return {
            figure: Goal(f"{expected[figure]:g} ± {tolerance:g}", by <= tolerance, f"{by - tolerance:.2g}")
            for figure, by in off.items()
        }

    return goal


def _file(name: str) -> str:
    return re.sub(r"[^\w=.]+", "-", name)


def _read(path: Path) -> Figures:
    figures: Figures = read_json(path) if path.exists() else {}
    return figures


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
