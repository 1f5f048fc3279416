"""Curves of the subject score."""

from collections.abc import Sequence
from math import isinf
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure as Picture

from hollow_core.files import write_figure

from .trial import ONE, TWO


class Point(NamedTuple):
    """The subject score of a way."""

    place: float
    two: float
    """On two paths."""
    one: float
    error: float
    """The standard error of the difference to what the plot compares with."""


def plot(path: Path, axis: str, points: Sequence[Point], reference: str, score: float) -> None:
    """`points` over what `axis` names, and the `score` of the `reference`."""
    picture = Picture(figsize=(6, 3.4), layout="constrained")
    axes = picture.subplots()
    places, two, one, errors = zip(*points, strict=True)
    axes.axhline(score, linestyle="--", color="gray", label=reference)
    axes.errorbar(places, two, [0.0 if isinf(error) else error for error in errors], marker="o", capsize=3, label=TWO)
    axes.plot(places, one, marker=".", label=ONE)
    axes.set(xlabel=axis, ylabel="subject score")
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(path, picture)
