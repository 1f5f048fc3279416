"""Dynamic patches on the embedded model: `python -m benchmarks.patches --out DIR`.

Trainings on records of a quarter of the pixels, with the same steps, time steps and noise: crops that are the larger
the more noise there is (dynamic), the other way round (reversed), of any size whatever the noise (random), always the
whole picture made small (half size), or always at their own size (small crops); and on whole pictures, hollowed as the
demo's. DiT-BlockSkip (arXiv 2603.20755) has dynamic before random, reversed and small pictures. `--quick` makes a small
run. What is done is kept in DIR, so that a stopped run goes on. Prints a table.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import held_out
from benchmarks.paper.figures import Figure, plain, signed
from hollow_core.demo import run, world
from hollow_core.lora import file as lora_file
from hollow_core.memory.setting import Setting
from hollow_core.request import Request
from hollow_core.training.store import Record

SIDE = world.SIZE // 2
WHOLE = "whole pictures"


def noise(record: Record) -> float:
    """t / T of the embedded model."""
    return record.timestep / 999


ORDERS: dict[str, Callable[[Record], float] | None] = {
    WHOLE: None,
    "half size": lambda record: 1.0,
    "dynamic": noise,
    "reversed": lambda record: 1 - noise(record),
    "random": lambda record: torch.rand((), generator=torch.Generator().manual_seed(record.noise_seed)).item(),
    "small crops": lambda record: 0.0,
}
"""For how much noise a record's crop is large enough, from 0 to 1."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hollow-patches"), help="folder for the results")
    parser.add_argument("--subjects", type=int, nargs="+", default=held_out.WIDER, help="which, from 0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings (default 0)")
    parser.add_argument("--steps", type=int, default=300, help="of each training (default 300)")
    parser.add_argument("--quick", action="store_true", help="one subject and a few steps: whether it runs")
    options = parser.parse_args(arguments)
    options.training = replace(run.SETTINGS, steps=10 if options.quick else options.steps)
    options.sampling = replace(held_out.SAMPLING, steps=2) if options.quick else held_out.SAMPLING
    options.subjects = options.subjects[:1] if options.quick else options.subjects
    options.samples, options.class_images = (20, 2) if options.quick else (run.SAMPLES, run.CLASS_IMAGES)
    held_out.keep_alike(options.out, {"quick": options.quick, "steps": options.training.steps})
    rows: dict[str, dict[tuple[int, int], dict[str, float]]] = {name: {} for name in ORDERS}
    for number in options.subjects:
        for seed in options.seeds:
            for name in ORDERS:
                folder, started = options.out / f"subject-{number}" / f"{name}, seed {seed}", time.monotonic()
                is_new = not (folder / "row.json").exists()
                row = held_out.kept(folder / "row.json", partial(measure, options, number, seed, name, folder))
                rows[name][number, seed] = row
                if is_new:
                    print(f"subject {number}, {name}: {row} {time.monotonic() - started:.0f} s", flush=True)
    print("\n| | subject | over half size | scene | structure | seconds a training |\n" + "|---" * 6 + "|")
    for name, of_way in rows.items():
        over = {key: row["subject"] - rows["half size"][key]["subject"] for key, row in of_way.items()}
        scores = [
            plain(Figure.of({key: row[what] for key, row in of_way.items()}))
            for what in ("subject", "scene", "structure")
        ]
        seconds = Figure.of({key: row["seconds"] for key, row in of_way.items()})
        assert seconds is not None
        print(f"| {name} | {scores[0]} | {signed(Figure.of(over))} | {scores[1]} | {scores[2]} | {seconds.mean:.0f} |")


def measure(options: argparse.Namespace, number: int, seed: int, name: str, folder: Path) -> dict[str, float]:
    """Scores of a training as the demo's is but for its records, on a single path; and how long its steps took."""
    subject = world.HELD_OUT[number]
    training = replace(options.training, seed=seed)
    setting = Setting(run.CUT, samples=options.samples, class_images=options.class_images, training=training)
    order = ORDERS[name]
    if order is not None:
        setting = replace(setting, patches=SIDE)
    images = held_out.references(folder.parent / "references", subject)
    request = Request(images, subject.kind, run.IDENTIFIER, setting)
    learned = held_out.learn(request, folder, folder.parent / "class", noise=order)
    base = run.model()
    lora = lora_file.load(learned.file, base.unet)
    scores = held_out.scores(base, subject, lora, options.sampling, single_path=True)
    return {**scores, "seconds": round(learned.seconds, 1)}


if __name__ == "__main__":
    main()
