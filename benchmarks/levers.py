"""What each lever of memory costs in quality and time: `python -m benchmarks.levers --out DIR`.

Hollowed LoRAs of held-out subjects of the embedded model, trained with the demo's settings, once with each lever and
otherwise alike, with the same seed. The loss is the mean of the last hundred steps, the subject score that of two-path
pictures in new scenes, drawn by the full base, and its spread that over the subjects of the difference to the first
lever's; time is the median training step's over the first lever's, for which the machine must be idle: `--quick`
gives it alone. Minutes a lever and subject; what is done is kept in DIR, so that a stopped run goes on. Writes
DIR/levers.json and prints the table.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks import held_out
from benchmarks.paper.figures import Figure, signed
from hollow_core.demo import run, world
from hollow_core.files import write_json
from hollow_core.lora import file as lora_file
from hollow_core.memory.setting import Setting
from hollow_core.progress import Progress
from hollow_core.request import Request
from hollow_core.road import personalize

LEVERS: dict[str, dict[str, dict[str, Any]]] = {
    "fp32": {},
    "8-bit base": {"setting": {"base_bits": 8}},
    "4-bit base": {"setting": {"base_bits": 4}},
    "streamed": {"setting": {"streaming": True}},
    "checkpointing": {"training": {"gradient_checkpointing": True}},
    "bf16 arithmetic": {"training": {"precision": "bf16"}},
    "8-bit AdamW": {"training": {"optimizer": "adamw8bit"}},
    "four records at once": {"training": {"together": 4}},
}
"""Of `Setting` and of `TrainSettings`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hollow-levers"), help="folder for the results")
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS), help="which; the first is plain")
    parser.add_argument("--subjects", type=int, nargs="+", default=held_out.WIDER, help="which, from 0")
    parser.add_argument("--quick", action="store_true", help="few records and steps: for the times alone")
    arguments = parser.parse_args()
    first = arguments.levers[0]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.levers}
    for subject in arguments.subjects:
        for name in arguments.levers:
            rows[name].append(measured(arguments.out, name, subject, quick=arguments.quick))
    write_json(arguments.out / "levers.json", rows)
    print("\n| lever | loss | greatest difference of a step's loss | subject score | difference | scene score | time |")
    for name, of in rows.items():
        print(f"| {name} | " + " | ".join(summary(of, rows[first])) + " |")


def summary(rows: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of a lever, given each subject's row, and the first lever's."""
    pairs = list(zip(rows, first, strict=True))
    more = Figure.of({(number, 0): row["subject"] - plain["subject"] for number, (row, plain) in enumerate(pairs)})
    apart = max(abs(a - b) for row, plain in pairs for a, b in zip(row["losses"], plain["losses"], strict=True))
    return [
        f"{mean(mean(row['losses'][-100:]) for row in rows):.4f}",
        f"{apart:.4f}",
        f"{mean(row['subject'] for row in rows):.3f}",
        signed(more),
        f"{mean(row['scene'] for row in rows):.3f}",
        f"{median(row['seconds_a_step'] / plain['seconds_a_step'] for row, plain in pairs):.2f}",
    ]


def measured(out: Path, name: str, subject: int, *, quick: bool) -> dict[str, Any]:
    """{"losses", "subject", "scene", "structure", "seconds_a_step"} of one lever; read back if measured before."""
    folder = out / f"subject-{subject}" / name.replace(" ", "-")
    measure = partial(_measure, folder, world.HELD_OUT[subject], LEVERS[name], quick)
    row: dict[str, Any] = held_out.kept(folder / "row.json", measure)
    return row


def _measure(
    folder: Path, subject: world.Subject, lever: Mapping[str, Mapping[str, Any]], quick: bool
) -> dict[str, Any]:
    # one record at a time, as where memory is short
    alone: dict[str, Any] = {"steps": 60 if quick else run.SETTINGS.steps, "together": 1}
    request = Request(
        held_out.references(folder / "references", subject),
        subject.kind,
        run.IDENTIFIER,
        Setting(
            run.CUT,
            samples=16 if quick else run.SAMPLES,
            class_images=2 if quick else run.CLASS_IMAGES,
            training=replace(run.SETTINGS, **{**alone, **lever.get("training", {})}),
            **lever.get("setting", {}),
        ),
    )
    moments: list[float] = []

    def watch(stage: str, done: Progress) -> None:
        if stage == "train":
            moments.append(time.monotonic())
        if done.step % 50 == 0:
            print(folder.name, stage, done.step, done.loss, flush=True)

    outcome = personalize(run.model, request, folder, progress=watch)
    assert outcome.file is not None
    assert outcome.result is not None
    base = run.model()
    return {
        "losses": outcome.result.losses,
        **held_out.scores(base, subject, lora_file.load(outcome.file, base.unet)),
        "seconds_a_step": median(after - before for before, after in pairwise(moments)),
    }


if __name__ == "__main__":
    main()
