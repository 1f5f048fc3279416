"""Backpropagation, MeZO and their mixture: `python -m benchmarks.selective --out DIR`.

Ways to train on the first six held-out subjects of the embedded model, with the same number of steps: subject and
structure score of pictures in new scenes (on two paths where hollowed), and the loss at full size. Structure is the
embedded reader's probability of the subject's class. And what a zeroth-order step can do at all: how its direction, of
more queries, of fewer time steps, in parts of the LoRA only, lies to the true gradient, and how far the loss falls
along it at most. What is done is kept in DIR, so that a stopped run goes on, and several may share DIR, each with its
own `--subjects`; `--subjects 0 --steps 100` is a small run. Writes DIR/selective.json with the peak of a dry run and
the operations of a step for SD1.5 at 512², and prints the tables.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from benchmarks import held_out
from benchmarks.paper.figures import Figure, signed
from benchmarks.patches import ORDERS, SIDE
from hollow_core.demo import run, scorers, world
from hollow_core.files import write_json
from hollow_core.lora import file as lora_file
from hollow_core.lora.file import LoraFile
from hollow_core.lora.layers import ATTENTION, load_lora_state, named_lora_parameters
from hollow_core.memory.planner import GIB, Planner
from hollow_core.memory.setting import Setting
from hollow_core.models.base_model import BaseModel
from hollow_core.nets.network import at_cut
from hollow_core.request import Request
from hollow_core.training.selective import Probability, Strategy, count_by_time, falling, heat_map
from hollow_core.training.settings import TrainSettings
from hollow_core.training.steps import Loss, Part, Step, ZerothOrder, backpropagate, part_loss, read_parts
from hollow_core.training.store import Kind, Store

ZO_LEARNING_RATE = 1e-4
AT_ONCE = 25
PLAIN = "BP at full size"


class Way(NamedTuple):
    """One way to train."""

    strategy: Strategy = "selective"
    low: str = "half size"
    """What BP-low sees, of `ORDERS`."""
    probability: Probability = falling(1.0)
    cut: int | None = None
    zo: Mapping[str, Any] = {}
    """Other settings of zeroth-order steps."""


def always(t: float, s: float) -> float:
    """p(BP-low) of BP-low alone."""
    return 1.0


def first_half(t: float, s: float) -> float:
    """p(BP-low) of ZO-high after BP-low."""
    return float(s < 0.5)


def edge(t: float, s: float) -> float:
    """p(BP-low) of an edge that falls: ZO-high at the time steps above what is left of the training."""
    return float(t < 1 - s)


FORMS = ("half size", "small crops", "dynamic")
STRENGTHS = {"zo_strengths": True, "zo_queries": 8, "zo_learning_rate": 1e-3}
"""One number a matrix, which eight queries tell something of."""
STRONGER = {"zo_queries": 8, "zo_learning_rate": 1e-3}
"""Four times the forward passes, ten times the rate."""
WAYS = {
    PLAIN: Way("bp"),
    **{f"BP-low only, {form}": Way(low=form, probability=always) for form in FORMS},
    **{f"selective, γ = 1, {form}": Way(low=form) for form in FORMS},
    "ZO-high after BP-low, half size": Way(probability=first_half),
    "selective, falling edge, half size": Way(probability=edge),
    "selective, γ = 1, half size, stronger ZO": Way(zo=STRONGER),
    "ZO-high after BP-low, half size, in strengths": Way(probability=first_half, zo=STRENGTHS),
    "selective, γ = 1, half size, in strengths": Way(zo=STRENGTHS),
    "hollowed": Way("bp", cut=run.CUT),
    "selective, γ = 1, half size, hollowed": Way(cut=run.CUT),
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
    parser.add_argument("--subjects", type=int, nargs="+", default=held_out.WIDER, help="which, from 0")
    parser.add_argument("--steps", type=int, default=held_out.STEPS, help="of each training")
    parser.add_argument("--zo-learning-rate", type=float, default=ZO_LEARNING_RATE, help="of zeroth-order steps")
    options = parser.parse_args()
    held_out.keep_alike(options.out, {"steps": options.steps, "zo_learning_rate": options.zo_learning_rate})
    results: dict[str, Any] = {"sd15": held_out.kept(options.out / "sd15.json", sd15_rows)}
    print("\n| SD1.5, rank 16, fp32 | base | peak, GiB | of BP's | TFLOP a step |\n|---|---|---|---|---|")
    for row in results["sd15"]:
        print("| {way} | {base} | {peak:.2f} | {ratio:.2f} | {tflop:.2f} |".format(**row), flush=True)
    subjects = [subject_scores(options, number) for number in options.subjects]
    print("\n| | subject | over BP's | structure | over BP's | colour | shape | loss | seconds |\n" + "|---" * 9 + "|")
    for name in WAYS:
        print(f"| {name} | " + " | ".join(summary(subjects, name)) + " |")
    known = base_losses(options)
    print("\nThe base model's loss: " + ", ".join(f"{size} {value:.3f}" for size, value in known.items()))
    small = [of_half_size(options, number) for number in options.subjects]
    print(
        "\nSubject score of pictures drawn at half size: "
        + ", ".join(f"{name} {mean(each[name] for each in small):.3f}" for name in small[0])
    )
    found = [of_directions(options, number) for number in options.subjects]
    print("\n| direction | numbers | cosine to the gradient | greatest fall of the loss, of its | forward passes |")
    print("|---" * 5 + "|")
    for name in found[0]:
        cosine, fall = (mean(each[name][what] for each in found) for what in ("cosine", "fall"))
        size, passes = (found[0][name][what] for what in ("size", "passes"))
        print(f"| {name} | {size} | {cosine:.5f} | {fall:.5f} | {passes} |")
    write_json(
        options.out / "selective.json",
        results | {"subjects": subjects, "base losses": known, "half size": small, "directions": found},
    )


def summary(subjects: Sequence[Mapping[str, Mapping[str, Any]]], name: str) -> list[str]:
    """The columns of a way, given each subject's rows."""

    def over(kind: str) -> str:
        return signed(Figure.of({(n, 0): rows[name][kind] - rows[PLAIN][kind] for n, rows in enumerate(subjects)}))

    figures = {
        what: mean(rows[name][what] for rows in subjects)
        for what in ("subject", "structure", "colour", "shape", "loss", "seconds")
    }
    return [
        f"{figures['subject']:.3f}",
        over("subject") if name != PLAIN else "",
        f"{figures['structure']:.3f}",
        over("structure") if name != PLAIN else "",
        f"{figures['colour']:.3f}",
        f"{figures['shape']:.3f}",
        f"{figures['loss']:.3f}",
        f"{figures['seconds']:.0f}",
    ]


def subject_scores(options: argparse.Namespace, number: int) -> dict[str, dict[str, Any]]:
    """{way: row} for one subject; read back where it was measured before."""
    rows: dict[str, dict[str, Any]] = {}
    for name, way in WAYS.items():
        path = options.out / f"subject-{number}" / f"{name}.json"
        rows[name] = _once(path, partial(train_and_score, options, number, way, path.with_suffix("")))
    return rows


def base_losses(options: argparse.Namespace) -> dict[str, float]:
    """The loss of the base model on the subjects' pictures, whole and as BP-low sees them: whether it knows these."""
    places: dict[str, tuple[Kind, str]] = {"full size": ("image", FORMS[0])}
    places |= {form: ("low image", form) for form in FORMS}
    found: dict[str, list[float]] = {name: [] for name in places}
    for number, (name, (kind, form)) in product(options.subjects, places.items()):
        folder = options.out / f"subject-{number}" / f"BP-low only, {form}"
        found[name].append(loss(run.model(), Store.open(folder / "store"), None, kind=kind))
    return {name: mean(losses) for name, losses in found.items()}


@torch.no_grad()
def loss(base: BaseModel, store: Store, lora: LoraFile | None, cut: int | None = None, kind: Kind = "image") -> float:
    """The mean loss of all records of a kind: at full size what a training came to, whatever its steps were told."""
    network = at_cut(base.network, cut, range(1000))
    if lora is not None:
        load_lora_state(network.module, lora.state, lora.alpha)
    weighted = [(index, 1.0) for index in store.indices(kind)]
    parts = read_parts(store, base.schedule, weighted, together=AT_ONCE)
    return sum(part_loss(network, part).item() for part in parts) / len(weighted)


def train_and_score(options: argparse.Namespace, number: int, way: Way, folder: Path) -> dict[str, Any]:
    """Scores of one training, its time, and its steps of each kind by time step."""
    subject = world.HELD_OUT[number]
    settings = replace(
        run.SETTINGS,
        steps=options.steps,
        save_every=0,
        strategy=way.strategy,
        probability=way.probability,
        **{"zo_learning_rate": options.zo_learning_rate, **way.zo},
    )
    setting = Setting(
        way.cut,
        samples=run.SAMPLES,
        class_images=run.CLASS_IMAGES,
        training=settings,
        patches=SIDE if way.strategy == "selective" else None,
    )
    images = held_out.references(folder.parent / "references", subject)
    request = Request(images, subject.kind, run.IDENTIFIER, setting)
    learned = held_out.learn(request, folder, folder.parent / "class", noise=ORDERS[way.low])
    base = run.model()
    lora = lora_file.load(learned.file, base.unet)
    return {
        **held_out.scores(base, subject, lora),
        "loss": round(loss(base, learned.store, lora, way.cut), 4),
        "steps": settings.steps,
        "seconds": round(learned.seconds, 1),
        "by_time": count_by_time(learned.result.taken),
    }


def of_half_size(options: argparse.Namespace, number: int) -> dict[str, float]:
    """The subject score of pictures drawn at half size, where BP-low learns, of a LoRA that learned there, and of one
    that did not; and of real pictures of that size."""

    def measure() -> dict[str, float]:
        subject, judge = world.HELD_OUT[number], scorers.load()

        def seen(pictures: Sequence[Image.Image]) -> list[Image.Image]:
            small = [picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for picture in pictures]
            return [picture.resize((world.SIZE, world.SIZE), Image.Resampling.BICUBIC) for picture in small]

        references = seen([picture for _, picture in world.reference_pictures(subject)])
        real = [world.draw(subject, scene, random.Random(place)) for place, scene in enumerate(held_out.SCENES)]
        found = {"real pictures": judge.subject_score(seen(real), references)}
        for name in (f"BP-low only, {FORMS[0]}", PLAIN):
            base, settings = run.model(), replace(held_out.SAMPLING, size=(SIDE, SIDE))
            lora = lora_file.load(options.out / f"subject-{number}" / name / run.LORA_FILE, base.unet)
            drawn = run.draw(base, run.called(subject), held_out.SCENES, settings, lora=lora)
            found[name] = judge.subject_score(seen(drawn), references)
        return found

    scores: dict[str, float] = held_out.kept(options.out / f"subject-{number}" / "half.json", measure)
    return scores


# What a zeroth-order step can do at all


def of_directions(options: argparse.Namespace, number: int) -> dict[str, dict[str, Any]]:
    """{direction: {"size", "cosine", "fall", "passes"}} where BP-low has come to, on 24 records at full size:
    the cosine of a zeroth-order step to the gradient, and the greatest fall of the loss along it over that along the
    gradient. "size" is of how many numbers the direction is drawn."""

    def measure() -> dict[str, dict[str, Any]]:
        base, place = run.model(), options.out / f"subject-{number}" / f"BP-low only, {FORMS[0]}"
        lora, store = lora_file.load(place / run.LORA_FILE, base.unet), Store.open(place / "store")
        module = base.network.module
        load_lora_state(module, lora.state, lora.alpha)
        named = named_lora_parameters(module)
        images = store.indices("image")
        late = [index for index in images if 500 <= store.records[index].timestep < 900]
        parts, parts_late = (
            read_parts(store, base.schedule, [(index, 1 / 24) for index in some[:24]], together=24)
            for some in (images, late)
        )
        loss_of = partial(part_loss, base.network)
        parameters = list(named.values())
        gradient = _gradient(backpropagate, loss_of, parts, parameters)
        along = _fall(loss_of, parts, parameters, gradient)
        subsets = {
            "every matrix": (list(named), parts),
            "every matrix, time steps 500 to 900": (list(named), parts_late),
            "up matrices": ([name for name in named if "lora_B" in name], parts),
            "attention": ([name for name in named if any(f".{end}." in name for end in ATTENTION)], parts),
        }
        strengths = "one number a matrix, its strength"
        subsets[strengths] = (list(named), parts)
        rows = {}
        for (name, (of, seen)), queries in product(subsets.items(), (2, 8, 32)):
            if queries != 8 and len(of) < len(named):
                continue
            drawn = [named[each] for each in of]
            size = len(drawn) if name == strengths else sum(each.numel() for each in drawn)
            estimate = ZerothOrder(drawn, seed=1000 * queries, queries=queries, strengths=name == strengths)
            step = _gradient(estimate, loss_of, seen, parameters)
            fall = _fall(loss_of, parts, parameters, step)
            cosine = _dot(step, gradient) / (_dot(step, step) * _dot(gradient, gradient)) ** 0.5
            rows[f"{name}, {queries} queries"] = {
                "size": size,
                "cosine": cosine,
                "fall": fall / along,
                "passes": 2 * queries,
            }
        return rows

    found: dict[str, dict[str, Any]] = held_out.kept(options.out / f"subject-{number}" / "directions.json", measure)
    return found


def _gradient(step: Step, loss_of: Loss, parts: Sequence[Part], parameters: Sequence[Tensor]) -> list[Tensor]:
    """What a step finds, 0 where it does not look."""
    step(loss_of, parts)
    found = [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


@torch.no_grad()
def _fall(loss_of: Loss, parts: Sequence[Part], parameters: Sequence[Tensor], step: Sequence[Tensor]) -> float:
    """The greatest fall of the loss against `step`, of steps of many lengths."""

    def at(length: float) -> float:
        with _moved(parameters, step, -length / _dot(step, step) ** 0.5):
            return sum(loss_of(part).item() for part in parts)

    here = at(0.0)
    return max(here - at(0.01 * 2**power) for power in range(-6, 8))


@contextmanager
def _moved(parameters: Sequence[Tensor], direction: Sequence[Tensor], distance: float) -> Iterator[None]:
    """While inside, the parameters are somewhere else."""
    before = [parameter.clone() for parameter in parameters]
    torch._foreach_add_(list(parameters), list(direction), alpha=distance)
    try:
        yield
    finally:
        torch._foreach_copy_(list(parameters), before)


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return sum(torch.dot(a.flatten(), b.flatten()).item() for a, b in zip(one, other, strict=True))


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
