"""Which way each training step goes, and on which records: the strategies bp, zo and selective.

Selective optimisation (arXiv 2507.10029) mixes two kinds of steps. BP-low, backpropagation on pictures of a low
resolution, learns fast but distorts structure; ZO-high, MeZO at full resolution, keeps structure at an inference's
memory, but learns nothing from scratch. At each step a probability that knows the time step picks one of them.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from ..errors import HollowError
from ..files import write_figure
from .store import Store

Strategy = Literal["bp", "zo", "selective"]
StepKind = Literal["bp", "bp-low", "zo-high"]

Probability = Callable[[float, float], float]
"""p(t, s) of a BP-low step: t from 0 (clean) to 1 (noise) of all time steps, s from 0 to 1 of the training."""


def falling(gamma: float) -> Probability:
    """p(t, s) = (1 − t)^(γ s): always BP-low at the start, and later the rarer the higher t is and the larger γ.

    The paper's abstract asks for both properties; its own formula is not public, so this one is ours.
    """
    return lambda t, s: (1 - t) ** (gamma * s)


class Choice(NamedTuple):
    """What one step is to do."""

    kind: StepKind
    weighted: list[tuple[int, float]]  # records and their weights
    seed: int  # of a zeroth-order step's directions


class Taken(NamedTuple):
    """An image record that a step has trained on."""

    kind: StepKind
    timestep: int


def choices(
    store: Store,
    strategy: Strategy,
    *,
    batch: int,
    prior_weight: float,
    steps: int,
    timesteps: int,
    probability: Probability,
    zo_timesteps: tuple[int, int] | None,
    seeds: Sequence[int],
) -> Iterator[Choice]:
    """Every step's choice from the first on, decided by `seeds` (four) alone: to go on is to skip what is done.

    A step has `batch` image records and as many of the prior, if `prior_weight` is not 0. Under "selective" they
    are drawn first, with them the time step t, out of `timesteps`; then it is BP-low, on the twins of the
    records, with `probability` (the mean over the image records), else ZO-high, on them. `zo_timesteps` lets
    zeroth-order steps draw anew from the time steps of this range, its end excluded. `steps` is all of the
    training. Raises HollowError for a store without twins or without a record in that range, and for a
    probability that is none.
    """
    images = store.indices("image")
    prior = store.indices("prior") if prior_weight > 0 else []
    low = dict(zip([*images, *store.indices("prior")], _low(store), strict=True)) if strategy == "selective" else {}
    dealt = _dealt(images, prior, batch, prior_weight, seeds[0], seeds[1])
    partial = None
    if zo_timesteps is not None and strategy != "bp":
        within = range(*zo_timesteps)
        images, prior = ([i for i in part if store.records[i].timestep in within] for part in (images, prior))
        if not images:
            raise HollowError(
                f"The store in {store.folder} has no record at the time steps {within.start} to {within.stop}. "
                "Choose a wider range, or precompute more samples."
            )
        partial = _dealt(images, prior, batch, prior_weight, *(seed ^ seeds[2] for seed in seeds[:2]))
    generator = torch.Generator().manual_seed(seeds[3])
    for step in count():
        weighted = next(dealt)
        seed = int(torch.randint(2**62, (), generator=generator))
        coin = torch.rand((), generator=generator, dtype=torch.float64).item()
        kind: StepKind = "bp" if strategy == "bp" else "zo-high"
        if strategy == "selective":
            drawn = [store.records[index].timestep / timesteps for index, _ in weighted[:batch]]
            p = sum(_checked(probability, t, min(step / steps, 1.0)) for t in drawn) / batch
            kind = "bp-low" if coin < p else "zo-high"
        if kind == "bp-low":
            weighted = [(low[index], weight) for index, weight in weighted]
        elif kind == "zo-high" and partial is not None:
            weighted = next(partial)
        yield Choice(kind, weighted, seed)


def taken(store: Store, choice: Choice) -> list[Taken]:
    """The image records of a choice."""
    records = [store.records[index] for index, _ in choice.weighted]
    return [Taken(choice.kind, record.timestep) for record in records if record.kind.endswith("image")]


def count_by_time(steps: Sequence[Taken], timesteps: int = 1000, stretches: int = 10) -> list[dict[str, Any]]:
    """How many image records went each way, JSON-ready, a row for each of the equal `stretches` of time.

    A row is {"from": first time step, "to": the end, excluded, "bp": …, "bp-low": …, "zo-high": …}.
    """
    ends = [timesteps * stretch // stretches for stretch in range(stretches + 1)]
    return [
        {"from": first, "to": end}
        | {kind: sum(s.kind == kind and first <= s.timestep < end for s in steps) for kind in get_args(StepKind)}
        for first, end in pairwise(ends)
    ]


def heat_map(probability: Probability, across: int = 51) -> list[list[float]]:
    """p(t, s): a row for each t from 0 to 1, in it a value for each s, at the middles of `across` equal cells."""
    places = [(place + 0.5) / across for place in range(across)]
    return [[_checked(probability, t, s) for s in places] for t in places]


def save_schedule(path: Path, probability: Probability, steps: Sequence[Taken], timesteps: int = 1000) -> None:
    """Draw p(t, s) as a heat map, with every step that was taken on it, and the steps of each kind by t."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.4, 1])
    extent = (0, 1, 0, timesteps)
    image = left.imshow(heat_map(probability), origin="lower", extent=extent, aspect="auto", vmin=0, vmax=1)
    figure.colorbar(image, ax=left, label="p(BP-low)")
    for kind, mark in (("bp-low", "w."), ("zo-high", "r.")):
        places = [(place / len(steps), step.timestep) for place, step in enumerate(steps) if step.kind == kind]
        left.plot(*zip(*places, strict=True) if places else ([], []), mark, markersize=2, label=kind)
    left.set(xlabel="training progress s", ylabel="time step t", title="p(t, s) and the steps taken")
    rows = count_by_time(steps, timesteps)
    heights, below = timesteps / len(rows), [0] * len(rows)
    for kind, color in (("bp-low", "tab:blue"), ("zo-high", "tab:red")):
        found = [row[kind] for row in rows]
        right.barh([row["from"] for row in rows], found, heights, below, align="edge", color=color, label=kind)
        below = [one + other for one, other in zip(below, found, strict=True)]
    right.set(xlabel="image records", ylabel="time step t", ylim=(0, timesteps))
    right.legend()
    write_figure(path, figure)


def _low(store: Store) -> list[int]:
    """The twins at a low resolution of the image records and the prior's."""
    low = [*store.indices("low image"), *store.indices("low prior")]
    if not low:
        raise HollowError(
            f"The store in {store.folder} has no records at a lower resolution, which the strategy selective needs. "
            "Precompute with low-resolution examples, or choose the strategy bp or zo."
        )
    return low


def _checked(probability: Probability, t: float, s: float) -> float:
    p = probability(t, s)
    if not 0 <= p <= 1:
        raise HollowError(f"The probability of BP-low at t {t:.3g}, s {s:.3g} is {p}. It must be from 0 to 1.")
    return p


def _dealt(
    images: Sequence[int], prior: Sequence[int], batch: int, prior_weight: float, image_seed: int, prior_seed: int
) -> Iterator[list[tuple[int, float]]]:
    """The weighted records of a step, for ever: `batch` of the images, then as many of the prior, if any."""
    images_in_turn, prior_in_turn = _shuffled(images, image_seed), _shuffled(prior, prior_seed)
    while True:
        weighted = [(next(images_in_turn), 1 / batch) for _ in range(batch)]
        if prior:
            weighted += [(next(prior_in_turn), prior_weight / batch) for _ in range(batch)]
        yield weighted


def _shuffled(indices: Sequence[int], seed: int) -> Iterator[int]:
    """`indices` for ever, each epoch in a new random order."""
    generator = torch.Generator().manual_seed(seed)
    while indices:
        yield from (indices[place] for place in torch.randperm(len(indices), generator=generator).tolist())
