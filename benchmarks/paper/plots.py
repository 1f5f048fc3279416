"""Curves of the subject score, and prices of memory."""

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
    """On a single path; NaN, and not drawn, where that was not measured on all of them."""
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


class Price(NamedTuple):
    """What a way to save memory costs in quality."""

    gib: float
    score: float
    error: float
    name: str


def plot_prices(path: Path, prices: Sequence[Price]) -> None:
    """Memory across, logarithmic, and the subject score up; every way a named point, above it what is as small and
    better."""
    picture = Picture(figsize=(9, 5.4), layout="constrained")
    axes = picture.subplots()
    for number, price in enumerate(sorted(prices), start=1):
        is_hollowed = price.name.startswith("hollowed")
        axes.errorbar(
            price.gib,
            price.score,
            price.error,
            marker="o" if is_hollowed else "s",
            color="tab:blue" if is_hollowed else "tab:gray",
            capsize=3,
            linestyle="",
            label=f"{number}  {price.name}",
        )
        axes.annotate(f"{number}", (price.gib, price.score), (5, 5), textcoords="offset points", fontsize=9)
    axes.set_xscale("log")
    ticks = [1, 1.5, 2, 3, 4, 6, 8, 12, 16]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="peak of training, GiB (SD2.1 at 512 pixels, fp32, dry run)", ylabel="subject score")
    axes.grid(alpha=0.3)
    picture.legend(loc="outside right upper", fontsize=8)
    write_figure(path, picture)
