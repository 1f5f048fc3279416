"""The main comparisons, on all held-out subjects; whether the judges agree; and what to give up first."""

from collections.abc import Sequence
from pathlib import Path
from statistics import correlation
from typing import NamedTuple

from hollow_core.demo import run

from .figures import NOT_MEASURED, Figure, Measured, plain, short, signed
from .plots import Price, plot_prices
from .predictions import Predicted
from .tables import table, trainings
from .trial import ONE, TWO, use_of
from .ways import CUTS, EIGHT_BITS, FULL, GIVING_UP, HOLLOWED, LEARNING, LORA, LORA_RANKS, SAMPLES, SMALLER, Way

JUDGES = ("subject", "colour", "shape")


class Use(NamedTuple):
    """A way, and how its LoRA is used."""

    way: Way
    use: str


THIRTY = {
    "plain LoRA": Use(LORA, ONE),
    "full fine-tuning": Use(FULL, ONE),
    **{f"hollowed at k={cut}": Use(CUTS[cut], TWO) for cut in (1, run.CUT, 6)},
    f"k={run.CUT}, the same file on a single path": Use(HOLLOWED, ONE),
    f"k={run.CUT}, the base path every 3 steps": Use(HOLLOWED, f"{TWO}, refresh 3"),
    f"k={run.CUT}, base in 8 bits": Use(EIGHT_BITS[HOLLOWED], TWO),
    f"k={run.CUT}, 200 records": Use(SAMPLES[200], TWO),
    f"k={run.CUT}, 1000 records": Use(SAMPLES[1000], TWO),
}
NAMES = {
    LORA: "plain LoRA",
    FULL: "full fine-tuning",
    HOLLOWED: f"hollowed, k={run.CUT}",
    CUTS[1]: "hollowed, k=1",
    CUTS[6]: "hollowed, k=6",
    EIGHT_BITS[LORA]: "base in 8 bits",
    EIGHT_BITS[HOLLOWED]: f"hollowed, k={run.CUT}, base in 8 bits",
    LORA_RANKS[1]: "LoRA of rank 1",
    LEARNING["up half"]: "LoRA on the up half only",
    LEARNING["outside the hollow"]: f"LoRA outside of k={run.CUT}, whose layers stay",
    LEARNING["most changed blocks"]: "LoRA on the half of the blocks that change most",
    **{way: f"pictures of {side} pixels" for side, way in SMALLER.items()},
}


def thirty(measured: Measured, predicted: Predicted) -> str:
    """Every main way against plain LoRA."""
    measured, rows = measured.part(seed=0), []
    for name, (way, use) in THIRTY.items():
        n = len(measured.values(way, use))
        over = ["" if way == LORA else signed(measured.difference(way, use, LORA, ONE, kind)) for kind in JUDGES]
        scene = plain(measured.figure(way, use, "scene"))
        gib = f"{predicted['gib'][way.name]:.2f}"
        rows.append([name, *(plain(measured.figure(way, use, kind)) for kind in JUDGES), *over, scene, gib, str(n)])
    head = ["", *JUDGES, *(f"{kind}, over plain LoRA" for kind in JUDGES), "scene", "SD2.1, GiB", "subjects"]
    return (
        f"## The main comparisons\n\nOne training of each subject in each row, rank {run.SETTINGS.rank}; differences "
        "are of the same subjects.\n\n"
    ) + table(head, rows)


def judges(measured: Measured) -> str:
    """Whether the trained judge and the one that nobody trained agree."""
    measured = measured.part(seed=0)
    uses = [each for each in THIRTY.values() if each.way != LORA]
    rows = []
    for kind in JUDGES[1:]:
        of_trainings = [
            (score, other)
            for way, use in THIRTY.values()
            for score, other in zip(
                measured.values(way, use).values(), measured.values(way, use, kind).values(), strict=True
            )
        ]
        of_ways = [
            (difference.mean, other.mean)
            for way, use in uses
            if (difference := measured.difference(way, use, LORA, ONE))
            and (other := measured.difference(way, use, LORA, ONE, kind))
        ]
        told = [
            _sign(one) == _sign(two)
            for way, use in uses
            if (one := measured.difference(way, use, LORA, ONE)) and _sign(one)
            if (two := measured.difference(way, use, LORA, ONE, kind))
        ]
        rows.append([kind, _correlation(of_trainings), _correlation(of_ways), f"{sum(told)} of {len(told)}"])
    return (
        "## Do the judges agree?\n\nThe subject score is by an encoder that was trained for this. The two others "
        "nobody trained: the subject, cut out of its ground, is laid over a picture where it fits best, and under its "
        "mask colours are compared by their histograms, shapes by structural similarity. Real pictures have .93 and "
        ".92, others of the class .31 and .31.\n\n"
        + table(
            [
                "",
                "correlation with the subject score, over trainings",
                "over the ways' means",
                "differences that the subject score tells, told here, too",
            ],
            rows,
        )
    )


def _sign(figure: Figure) -> int:
    """Of a difference that can be told from none, to 95 %."""
    low, high = figure.interval
    return (low > 0) - (high < 0)


def _correlation(pairs: Sequence[tuple[float, float]]) -> str:
    return short(correlation(*zip(*pairs, strict=True))) if len(pairs) > 2 else NOT_MEASURED


def giving_up(out: Path, measured: Measured, predicted: Predicted) -> str:
    """What each way to save memory costs in quality, as a table and a picture."""
    measured = measured.shared(GIVING_UP)
    rows, prices = [], []
    full = predicted["gib"][LORA.name]
    for way, name in NAMES.items():
        if way.name not in predicted["gib"]:  # which blocks change most is not known yet
            continue
        use = use_of(way)
        score, over = measured.figure(way, use), measured.difference(way, use, LORA, ONE)
        sizes = {name: predicted["gib"][way.name]} | {
            f"{name}, checkpointing": gib for of, gib in predicted["recomputed"].items() if of == way.name
        }
        for words, gib in sizes.items():
            if score and over:
                prices.append(Price(gib, score.mean, 0.0 if way == LORA else over.error, words))
            more = "" if way == LORA else signed(over)
            colour, shape = (plain(measured.figure(way, use, kind)) for kind in JUDGES[1:])
            rows.append([words, f"{gib:.2f}", f"{gib / full:.2f}", plain(score), more, colour, shape])
    rows.sort(key=lambda row: float(row[1]))
    text = (
        f"## What to give up first\n\n{trainings(measured)} Ways to save memory on the same base, from least memory to "
        "most. Checkpointing changes no bit of what is learned, and takes about a third more time on a GPU. LoRA "
        "outside of the hollow, whose layers stay where they are, saves next to nothing: it is what hollowing could "
        "learn at best.\n\n"
    )
    if len(prices) > 2:
        plot_prices(out / "giving-up.png", prices)
        text += "![Subject score over memory](giving-up.png)\n\n"
        text += "Bars: the standard error of the difference to plain LoRA.\n\n"
    return text + table(["", "SD2.1, GiB", "of plain LoRA's", "subject", "over plain LoRA", "colour", "shape"], rows)
