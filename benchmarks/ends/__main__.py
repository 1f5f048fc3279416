"""Which blocks of the embedded transformer may go, and what must stand for them: `python -m benchmarks.ends --out DIR`.

A plain LoRA, hollowed ones at 30 % and 50 % of the blocks, evenly and by the better split, without the residual, by the
U-Net's recipe (the middle out, its picture handed in), and of one end only; on six held-out subjects with three seeds.
`--only splits` looks for the better splits, on subjects that are not judged. Each training is kept in DIR, so that a
stopped run goes on, and several may share DIR, each with its own `--subjects`. Writes DIR/ENDS.md and DIR/ends.png.
"""

import argparse
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks import held_out
from benchmarks.paper.figures import Figure, plain, signed
from hollow_core.data import grid
from hollow_core.data.picture_file import open_picture
from hollow_core.data.prompts import generic_prompt
from hollow_core.demo import run, world
from hollow_core.files import read_json, write_bytes, write_png
from hollow_core.lora.layers import load_lora_state
from hollow_core.memory.setting import Setting
from hollow_core.models.transformer_model import TransformerModel
from hollow_core.nets.network import Cut, Network, at_cut, removed_fraction
from hollow_core.nets.transformer import Transformer
from hollow_core.request import Request, make_examples
from hollow_core.training.precompute import precompute
from hollow_core.training.steps import part_loss, read_parts
from hollow_core.training.store import Store
from hollow_core.training.train import train

from .networks import MiddleOut, MiddleResidual, TwoPaths, WithoutResidual

DEMO = run.TRANSFORMER_DEMO
SAMPLING = replace(DEMO.sampling, steps=20, together=len(held_out.SCENES))
SAMPLES = 160
TRAINING = replace(DEMO.settings, steps=240, save_every=0)

ONE, TWO = "one path", "two paths"
LOSSES = ("loss as trained", "loss as drawn")
"""On the records, with the LoRA: of the hollowed network with what is stored, and of the whole one."""


@dataclass(frozen=True)
class Way:
    """A way to train."""

    name: str
    cut: Cut | None
    kind: type[Transformer] = Transformer

    @property
    def uses(self) -> tuple[str, ...]:
        """How pictures are drawn with its LoRA."""
        return (ONE, TWO) if self.kind is MiddleOut else (ONE,)


PLAIN = Way("plain LoRA", None)
WAYS = [
    PLAIN,
    Way("30 %, evenly", (2, 2)),
    Way("30 %, better split", (1, 3)),
    Way("50 %, evenly", (3, 3)),
    Way("50 %, better split", (5, 1)),
    Way("50 %, evenly, no residual", (3, 3), WithoutResidual),
    Way("50 %, the front only", (6, 0)),
    Way("50 %, the back only", (0, 6)),
    Way("50 %, the middle, its picture handed in", (3, 9), MiddleOut),
    Way("50 %, the middle, its residual added", (3, 9), MiddleResidual),
]
"""The better splits are those that `--only splits` found."""

SPLITS = [Way(f"{n},{k - n}", (n, k - n)) for k in (4, 6) for n in range(k + 1)]
LEARNERS = (1, 2)
"""Subjects on which the splits are chosen."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ends", description=__doc__.splitlines()[0])
    everyone = held_out.WIDER
    parser.add_argument("--out", type=Path, default=Path("hollow-ends"), help="folder for the results")
    parser.add_argument("--subjects", type=int, nargs="+", default=everyone, choices=everyone, help="which to train")
    parser.add_argument("--ways", nargs="+", default=[way.name for way in WAYS], help="which (default all)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each")
    parser.add_argument("--only", choices=("splits", "ways"), default="ways", help="the choice, or the comparison")
    parser.add_argument("--quick", action="store_true", help="one subject and seed and few steps: whether it runs")
    parser.add_argument("--report", action="store_true", help="train nothing: write what is there")
    options = parser.parse_args(arguments)
    options.training = replace(TRAINING, steps=10) if options.quick else TRAINING
    options.sampling = replace(SAMPLING, steps=2) if options.quick else SAMPLING
    options.samples = 20 if options.quick else SAMPLES
    subjects, seeds = ([0], range(1)) if options.quick else (options.subjects, range(options.seeds))
    if options.only == "splits":
        splits(options, LEARNERS[:1] if options.quick else LEARNERS)
        return
    if not options.report:
        for seed, way, number in product(seeds, [way for way in WAYS if way.name in options.ways], subjects):
            measured(options, way, number, seed)
    write(options, everyone, range(options.seeds))


def splits(options: argparse.Namespace, learners: Sequence[int]) -> None:
    """Every split of 30 % and of 50 %, on subjects of the training world."""
    rows = {
        way: {(number, 0): measured(options, way, number, 0, judged=False)[ONE] for number in learners}
        for way in ([PLAIN, *SPLITS[:2]] if options.quick else [PLAIN, *SPLITS])
    }
    for way, of_way in rows.items():
        scores = [Figure.of({key: row[what] for key, row in of_way.items()}) for what in ("subject", "scene")]
        print(f"| {way.name} | {' | '.join(map(plain, scores))} |", flush=True)


def measured(options: argparse.Namespace, way: Way, number: int, seed: int, *, judged: bool = True) -> dict[str, Any]:
    """The scores of a way on a subject, by use: of those that are judged, or of those on which splits are chosen."""
    folder = _folder(options, way, number, seed, judged=judged)
    subject = world.HELD_OUT[number] if judged else learner(number)
    is_new, started = not (folder / "row.json").exists(), time.monotonic()
    row: dict[str, Any] = held_out.kept(folder / "row.json", partial(_measure, options, way, subject, seed, folder))
    if is_new:
        print(f"subject {number}, seed {seed}, {way.name}: {row} {time.monotonic() - started:.0f} s", flush=True)
    return row


def _folder(options: argparse.Namespace, way: Way, number: int, seed: int, *, judged: bool) -> Path:
    group, name = "judged" if judged else "others", way.name.replace(" %", "").replace(",", "").replace(" ", "-")
    return Path(options.out) / group / f"subject-{number}" / f"seed-{seed}" / name


def learner(number: int) -> world.Subject:
    """A subject that is not judged, with a pattern, an emblem and an accessory."""
    subject = world.random_subject(random.Random(100 + number))
    return replace(subject, pattern=world.PATTERNS[1 + number % 3], emblem="star", accessory="hat")


def _measure(
    options: argparse.Namespace, way: Way, subject: world.Subject, seed: int, folder: Path
) -> dict[str, dict[str, float]]:
    base, training = run.model(DEMO), replace(options.training, seed=seed)
    whole = way.kind(base.network.module)
    examples = _examples(options, base, subject, folder)
    store = precompute(
        whole,
        base.schedule,
        examples,
        folder / "store",
        cut=way.cut,
        samples=options.samples,
        seed=seed,
        together=8,
        made_by="",
    )
    hollowed = at_cut(whole, way.cut, None)
    before = _loss(hollowed, base, store)
    result = train(hollowed, base.schedule, store, training, folder=folder)
    learned = {"loss before": before, "loss as trained": _loss(hollowed, base, store)}
    if result.stopped != "finished":
        raise RuntimeError(f"{folder} ended with a {result.stopped} after {result.steps} steps.")
    rows = {}
    for use in way.uses:
        model: Any = run.model(DEMO)
        if use == TWO:
            model = _on_two_paths(model, way, subject)
        load_lora_state(model.network.module, result.state, training.lora_alpha)
        as_drawn = _loss(model.network, base, store)
        drawn = run.draw(model, run.called(subject), held_out.SCENES, options.sampling)
        rows[use] = held_out.judged(drawn, subject) | learned | {"loss as drawn": as_drawn}
        for number, picture in enumerate(drawn[:: held_out.SEEDS_A_SCENE]):
            write_png(folder / f"{use}-{number}.png", picture)
    shutil.rmtree(folder / "store")
    return rows


@torch.no_grad()
def _loss(network: Network, base: TransformerModel, store: Store) -> float:
    """Of every fourth record: of a hollowed network with what is stored, of a whole one without."""
    records = range(0, len(store.records), 4)
    found = []
    for index in records:
        (part,) = read_parts(store, base.schedule, [(index, 1 / len(records))])
        found.append(part_loss(network, part if network.cut else part._replace(stored={})))
    return round(torch.stack(found).sum().item(), 4)


def _on_two_paths(model: TransformerModel, way: Way, subject: world.Subject) -> TransformerModel:
    """Pairs every prompt of `run.draw` with its generic one."""
    prompts = [world.photo_caption(run.called(subject), scene) for scene in dict.fromkeys(held_out.SCENES)]
    pairs = [
        (model.encode_prompt(prompt), model.encode_prompt(generic_prompt(prompt, run.IDENTIFIER))) for prompt in prompts
    ]
    assert isinstance(way.cut, tuple)
    network = TwoPaths(model.module, way.cut, pairs)
    return _OnTwoPaths(**vars(model), on_two_paths=network)


@dataclass(kw_only=True)
class _OnTwoPaths(TransformerModel):
    on_two_paths: TwoPaths

    @property
    def network(self) -> Transformer:
        return self.on_two_paths


def _examples(options: argparse.Namespace, base: Any, subject: world.Subject, folder: Path) -> list[Any]:
    """The subject's pictures alone, none of its class: a step has half of the records then."""
    images = held_out.references(folder / "references", subject)
    request = Request(images, subject.kind, run.IDENTIFIER, Setting(None, samples=options.samples))
    return make_examples(base, request, [])


def write(options: argparse.Namespace, subjects: Sequence[int], seeds: Sequence[int]) -> None:
    """The table, of the trials that are there, and the pictures of the first subject."""
    rows: dict[tuple[Way, str], dict[tuple[int, int], dict[str, float]]] = {}
    sheet = []
    for way in WAYS:
        for number, seed in product(subjects, seeds):
            folder = _folder(options, way, number, seed, judged=True)
            if not (folder / "row.json").exists():
                continue
            for use, row in read_json(folder / "row.json").items():
                rows.setdefault((way, use), {})[number, seed] = row
                if (number, seed) == (subjects[0], seeds[0]):
                    drawn = [open_picture(file) for file in sorted(folder.glob(f"{use}-*.png"))]
                    sheet.append(grid.Row(_called(way, use), drawn))
    network = run.model(DEMO).network
    head = ["way", "blocks out", "subject score", "over plain LoRA", "scene score", "parameters gone"]
    head += [f"{what}, of that before" for what in LOSSES]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (way, use), of_way in rows.items():
        subject, scene = (Figure.of({key: row[what] for key, row in of_way.items()}) for what in ("subject", "scene"))
        theirs = rows[PLAIN, ONE]
        over = Figure.of({key: row["subject"] - theirs[key]["subject"] for key, row in of_way.items() if key in theirs})
        gone = "" if way.cut is None else f"{100 * removed_fraction(way.kind(network.module), way.cut):.0f} %"
        known = [row for row in of_way.values() if LOSSES[0] in row]
        cells = [_called(way, use), _out(way), plain(subject), signed(over), plain(scene), gone]
        cells += [f"{100 * mean(row[what] / row['loss before'] for row in known):.0f} %" for what in LOSSES if known]
        lines.append(f"| {' | '.join(cells)} |")
    write_png(options.out / "ends.png", grid.grid(sheet, cell=128))
    text = "\n".join(lines)
    write_bytes(options.out / "ENDS.md", f"{text}\n".encode())
    print(text)


def _called(way: Way, use: str) -> str:
    return way.name if len(way.uses) == 1 else f"{way.name}, {use}"


def _out(way: Way) -> str:
    """Which blocks."""
    if way.cut is None:
        return ""
    first, second = way.cut if isinstance(way.cut, tuple) else (0, 0)
    if issubclass(way.kind, MiddleOut):
        return f"{first} to {second - 1}"
    return f"{first} first, {second} last"


if __name__ == "__main__":
    main()
