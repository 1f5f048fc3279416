"""Backpropagation, MeZO and their mixture: `python -m benchmarks.selective --out DIR`.

Ways to train on the six held-out subjects of the embedded model, with the same number of steps and, once more, in the
same time as backpropagation at full size: subject, scene and structure score of pictures in new scenes (on two paths
where hollowed), and the loss at full size. Structure is the embedded reader's probability of the subject's class. What
is done is kept in DIR, so that a stopped run goes on, and several may share DIR; `--subjects 0 --steps 100` is a small
run. Writes DIR/selective.json with the peak of a dry run and the operations of a step for SD1.5 at 512², and prints the
tables.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch

from benchmarks import held_out
from benchmarks.paper.figures import Figure, signed
from hollow_core.demo import run, world
from hollow_core.files import read_json, write_json
from hollow_core.lora import file as lora_file
from hollow_core.lora.file import LoraFile
from hollow_core.lora.layers import load_lora_state
from hollow_core.memory.planner import GIB, Planner
from hollow_core.memory.setting import Setting
from hollow_core.models.base_model import BaseModel
from hollow_core.nets.network import at_cut
from hollow_core.request import Request
from hollow_core.road import personalize
from hollow_core.training.selective import Probability, Strategy, count_by_time, falling, heat_map
from hollow_core.training.settings import TrainSettings
from hollow_core.training.steps import part_loss, read_parts
from hollow_core.training.store import Kind, Store

STEPS = 200
ZO_LEARNING_RATE = 1e-4
THREE_QUARTERS = 3 * world.SIZE // 4
AT_ONCE = 25
BUDGETS = ("same steps", "same time")


class Way(NamedTuple):
    """One way to train."""

    strategy: Strategy
    cut: int | None = None
    gamma: float = 1.0
    probability: Probability | None = None
    low_resolution: int | None = None
    share: float = 1.0
    """Of the steps: what the BP-low steps of a mixture do alone."""


def first_half(t: float, s: float) -> float:
    """p(BP-low) of ZO-high after BP-low."""
    return float(s < 0.5)


WAYS = {
    "BP at full size": Way("bp"),
    "BP-low only": Way("selective", gamma=0.0),
    "BP-low only, half of the steps": Way("selective", gamma=0.0, share=0.5),
    "ZO-high from scratch": Way("zo"),
    "ZO-high after BP-low": Way("selective", probability=first_half),
    "selective, γ = 0.5": Way("selective", gamma=0.5),
    "selective, γ = 1": Way("selective"),
    "selective, γ = 3": Way("selective", gamma=3.0),
    "BP-low only at 3/4": Way("selective", gamma=0.0, low_resolution=THREE_QUARTERS),
    "BP-low only at 3/4, half of the steps": Way("selective", gamma=0.0, low_resolution=THREE_QUARTERS, share=0.5),
    "ZO-high after BP-low at 3/4": Way("selective", probability=first_half, low_resolution=THREE_QUARTERS),
    "selective, γ = 0.1, at 3/4": Way("selective", gamma=0.1, low_resolution=THREE_QUARTERS),
    "selective, γ = 1, at 3/4": Way("selective", low_resolution=THREE_QUARTERS),
    "hollowed": Way("bp", run.CUT),
    "selective, γ = 1, hollowed": Way("selective", run.CUT),
    "selective, γ = 1, at 3/4, hollowed": Way("selective", run.CUT, low_resolution=THREE_QUARTERS),
}

SD15_WAYS: dict[str, list[tuple[Strategy, int]]] = {
    "BP at 512²": [("bp", 512)],
    "BP-low at 256²": [("bp", 256)],
    "BP-low at 384²": [("bp", 384)],
    "ZO-high at 512²": [("zo", 512)],
    "selective, γ = 1, 256²": [("bp", 256), ("zo", 512)],
    "selective, γ = 1, 384²": [("bp", 384), ("zo", 512)],
}
"""Each with its steps: how the gradient is found, and the side of the pictures."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hollow-selective"), help="folder for the results")
    parser.add_argument("--subjects", type=int, nargs="+", default=range(len(world.HELD_OUT)), help="which, from 0")
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=BUDGETS, help="which tables (default both)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of BP at full size")
    parser.add_argument("--zo-learning-rate", type=float, default=ZO_LEARNING_RATE, help="of zeroth-order steps")
    options = parser.parse_args()
    held_out.keep_alike(options.out, {"steps": options.steps, "zo_learning_rate": options.zo_learning_rate})
    results: dict[str, Any] = {"sd15": sd15_rows()}
    print("\n| SD1.5, rank 16, fp32 | base | peak, GiB | of BP's | TFLOP a step |\n|---|---|---|---|---|")
    for row in results["sd15"]:
        print("| {way} | {base} | {peak:.2f} | {ratio:.2f} | {tflop:.2f} |".format(**row), flush=True)
    for budget in options.budgets:
        subjects = [subject_scores(options, number, budget) for number in options.subjects]
        results[budget] = subjects
        print(f"\n| {budget} | subject | over BP's | scene | structure | loss | steps | seconds |\n" + "|---" * 8 + "|")
        for name in subjects[0]:
            print(f"| {name} | " + " | ".join(summary(subjects, name)) + " |")
        write_json(options.out / "selective.json", results)
    results["base_losses"] = base_losses(options)
    write_json(options.out / "selective.json", results)
    print(
        "\nThe base model's loss: " + ", ".join(f"{size} {value:.3f}" for size, value in results["base_losses"].items())
    )


def summary(subjects: list[dict[str, dict[str, Any]]], name: str) -> list[str]:
    """The columns of a way, given each subject's rows."""
    plain = "BP at full size"
    more = {(number, 0): rows[name]["subject"] - rows[plain]["subject"] for number, rows in enumerate(subjects)}
    figures = {what: mean(rows[name][what] for rows in subjects) for what in subjects[0][name] if what != "by_time"}
    return [
        f"{figures['subject']:.3f}",
        signed(Figure.of(more)),
        f"{figures['scene']:.3f}",
        f"{figures['structure']:.3f}",
        f"{figures['loss']:.3f}",
        f"{figures['steps']:.0f}",
        f"{figures['seconds']:.0f}",
    ]


def subject_scores(options: argparse.Namespace, number: int, budget: str) -> dict[str, dict[str, Any]]:
    """{way: row} for one subject; read back where it was measured before."""
    folder: Path = options.out / f"subject-{number}"
    subject = world.HELD_OUT[number]
    rows: dict[str, dict[str, Any]] = {}
    for name, way in WAYS.items():
        path, steps = folder / f"{_stem(name, options.steps)}.json", round(way.share * options.steps)
        rows[name] = _once(path, partial(train_and_score, options, subject, way, steps, path.with_suffix("")))
    if budget == "same time":
        pace = _pace(options)
        for name in list(rows)[1:]:
            way, path = WAYS[name], folder / f"{_stem(name, options.steps)}, in that time.json"
            if way.share < 1:  # it goes with a mixture of as many steps
                del rows[name]
                continue
            steps = max(round(options.steps * pace[name]), 1)
            rows[name] = _once(path, partial(train_and_score, options, subject, way, steps, path.with_suffix("")))
    return rows


def base_losses(options: argparse.Namespace) -> dict[str, float]:
    """The loss of the base model on the subjects' pictures at full size, at half of it and at three quarters: whether
    it knows small pictures at all."""
    places: dict[str, tuple[Kind, str]] = {
        "full size": ("image", "BP-low only"),
        "half": ("low image", "BP-low only"),
        "three quarters": ("low image", "BP-low only at 3/4"),
    }
    found: dict[str, list[float]] = {size: [] for size in places}
    for number, (size, (kind, way)) in product(options.subjects, places.items()):
        folder = options.out / f"subject-{number}" / _stem(way, options.steps)
        found[size].append(loss(run.model(), Store.open(folder / "store"), None, kind=kind))
    return {size: mean(losses) for size, losses in found.items()}


@torch.no_grad()
def loss(base: BaseModel, store: Store, lora: LoraFile | None, cut: int | None = None, kind: Kind = "image") -> float:
    """The mean loss of all records of a kind: at full size what a training came to, whatever its steps were told."""
    network = at_cut(base.network, cut, range(1000))
    if lora is not None:
        load_lora_state(network.module, lora.state, lora.alpha)
    weighted = [(index, 1.0) for index in store.indices(kind)]
    parts = read_parts(store, base.schedule, weighted, together=AT_ONCE)
    return sum(part_loss(network, part).item() for part in parts) / len(weighted)


def _stem(name: str, steps: int) -> str:
    return f"{name.replace('/', '_')}, {steps} steps"


def _pace(options: argparse.Namespace) -> dict[str, float]:
    """How many steps each way makes while BP at full size makes one: the median over the subjects that are there by
    now, as another program may have been busy meanwhile; kept, so that it is the same for all."""

    def measure() -> dict[str, float]:
        ratios: dict[str, list[float]] = {name: [] for name in WAYS}
        for folder, (name, of_name) in product(options.out.glob("subject-*"), ratios.items()):
            bp, other = (folder / f"{_stem(each, options.steps)}.json" for each in ("BP at full size", name))
            if bp.exists() and other.exists():
                mine = read_json(other)
                of_name.append(read_json(bp)["seconds"] / options.steps / (mine["seconds"] / mine["steps"]))
        return {name: median(of_name) for name, of_name in ratios.items()}

    pace: dict[str, float] = held_out.kept(options.out / "pace.json", measure)
    return pace


def train_and_score(
    options: argparse.Namespace, subject: world.Subject, way: Way, steps: int, folder: Path
) -> dict[str, Any]:
    """Scores of one training, its time, and its steps of each kind by time step."""
    settings = replace(
        run.SETTINGS,
        steps=steps,
        save_every=0,
        strategy=way.strategy,
        selective_gamma=way.gamma,
        probability=way.probability,
        zo_learning_rate=options.zo_learning_rate,
    )
    request = Request(
        held_out.references(folder.parent / "references", subject),
        subject.kind,
        run.IDENTIFIER,
        Setting(
            way.cut,
            samples=run.SAMPLES,
            class_images=run.CLASS_IMAGES,
            training=settings,
            low_resolution=way.low_resolution,
        ),
        folder.parent / "class",  # the same for all
    )
    outcome = personalize(run.model, request, folder)
    assert outcome.file is not None
    assert outcome.result is not None
    assert outcome.store is not None
    base = run.model()
    lora = lora_file.load(outcome.file, base.unet)
    return {
        **held_out.scores(base, subject, lora),
        "loss": round(loss(base, outcome.store, lora, way.cut), 4),
        "steps": steps,
        "seconds": round(outcome.meter.stages[-1].seconds, 1),
        "by_time": count_by_time(outcome.result.taken),
    }


def sd15_rows() -> list[dict[str, Any]]:
    """For each way, base and cut: the peak of training by a dry run in GiB, weights and AdamW's moments included, its
    ratio to that of BP at 512² on the same base, whole, and the operations of a step, those of selective the mean over
    its schedule at γ = 1."""
    planner = Planner("sd15")

    def setting(cut: int | None, bits: Any, strategy: Strategy, side: int) -> Setting:
        return Setting(cut, side, base_bits=bits, training=TrainSettings(strategy=strategy))

    rows = []
    low = mean(mean(row) for row in heat_map(falling(1.0)))
    for bits in (None, 8):
        full = planner.peak("train", setting(None, bits, "bp", 512)).total
        for cut in (None, run.CUT):
            for name, steps in SD15_WAYS.items():
                settings = [setting(cut, bits, *each) for each in steps]
                flops = [planner.step_flops(each) for each in settings]
                peak = planner.peak("train", settings[0]).total
                if len(steps) == 2:
                    both = replace(settings[1].training, strategy="selective")
                    peak = planner.peak("train", replace(settings[1], low_resolution=steps[0][1], training=both)).total
                rows.append(
                    {
                        "way": name if cut is None else f"{name}, hollowed",
                        "base": "fp32" if bits is None else f"{bits} bits",
                        "peak": peak / GIB,
                        "ratio": peak / full,
                        "tflop": (low * flops[0] + (1 - low) * flops[-1]) / 1e12,
                    }
                )
    return rows


def _once(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    started, is_new = time.monotonic(), not path.exists()
    row: dict[str, Any] = held_out.kept(path, measure)
    if is_new:
        print(f"{path.parent.name}, {path.stem}: {time.monotonic() - started:.0f} s", flush=True)
    print({key: value for key, value in row.items() if key != "by_time"}, flush=True)
    return row


if __name__ == "__main__":
    main()
