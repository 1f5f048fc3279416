"""Curves of the subject score."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure as Picture

from hollow_core.files import write_figure

from .figures import Figure


def plot(path: Path, axis: str, curves: Sequence[tuple[float, Figure, Figure]]) -> None:
    """The subject score on two paths and on one, with its standard error, over what `axis` names."""
    picture = Picture(figsize=(6, 3.4), layout="constrained")
    axes = picture.subplots()
    places = [place for place, _, _ in curves]
    for number, name in ((1, "two paths"), (2, "one path")):
        figures: list[Figure] = [curve[number] for curve in curves]  # type: ignore[misc]
        errors = [figure.error if figure.subjects > 1 else 0.0 for figure in figures]
        axes.errorbar(places, [figure.mean for figure in figures], errors, marker="o", capsize=3, label=name)
    axes.set(xlabel=axis, ylabel="subject score")
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(path, picture)
