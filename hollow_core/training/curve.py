"""The course of a training: its loss by step, and that of pictures held out."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from ..files import write_figure


def save_losses(
    path: Path,
    losses: Mapping[str, Sequence[float]],
    held_out: Mapping[str, Sequence[tuple[int, float]]] | None = None,
) -> None:
    """Draw each training's loss by step, smoothed, and losses that are known after some steps only."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (smoothed)")
    for name, values in losses.items():
        axes.plot(list(accumulate(values, lambda smooth, value: 0.97 * smooth + 0.03 * value)), label=name)
    for name, points in (held_out or {}).items():
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.legend()
    axes.grid(alpha=0.3)
    write_figure(path, figure)
