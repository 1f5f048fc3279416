"""How long the demo trains, and on how many pictures a step: `python -m benchmarks.choose --out DIR`.

Hollowed LoRAs of three subjects by whom nothing is judged, at each number of records a step and learning rate, looked
at along the way. What is done is kept in DIR. Prints a table.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean

from torch import Tensor

from benchmarks import held_out
from hollow_core.demo import run, world
from hollow_core.lora.file import LoraFile
from hollow_core.lora.metadata import recipe_for
from hollow_core.memory.setting import Setting
from hollow_core.request import Request

STEPS = (100, 150, 200, 300, 400)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hollow-choose"), help="folder for the results")
    parser.add_argument("--subjects", type=int, nargs="+", default=range(len(world.CHOSEN_ON)), help="which, from 0")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2], help="records of the subject a step")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3], help="learning rates")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="after which to look")
    options = parser.parse_args()
    print("| records a step, rate, steps | subject | colour | shape | scene | seconds |\n|---|---|---|---|---|---|")
    for batch, rate in product(options.batches, options.rates):
        found = [looks(options, number, batch, rate) for number in options.subjects]
        for steps in map(str, options.steps):
            kinds = ("subject", "colour", "shape", "scene", "seconds")
            row = [f"{mean(each[steps][kind] for each in found):.3f}" for kind in kinds]
            print(f"| {batch}, {rate:g}, {steps} | " + " | ".join(row) + " |", flush=True)


def looks(options: argparse.Namespace, number: int, batch: int, rate: float) -> dict[str, dict[str, float]]:
    """{steps: scores} of one training."""
    subject, folder = world.CHOSEN_ON[number], options.out / f"subject-{number}"
    path = folder / f"{batch}, {rate:g}.json"

    def measure() -> dict[str, dict[str, float]]:
        training = replace(
            run.SETTINGS, batch=batch, together=2 * batch, learning_rate=rate, steps=max(options.steps), save_every=50
        )
        images = held_out.references(folder / "references", subject)
        setting = Setting(run.CUT, samples=run.SAMPLES, class_images=run.CLASS_IMAGES, training=training)
        request = Request(images, subject.kind, run.IDENTIFIER, setting)
        states: dict[int, Mapping[str, Tensor]] = {}
        learned = held_out.learn(request, path.with_suffix(""), folder / "class", saved=states.__setitem__)
        base = run.model()
        recipe = recipe_for(run.CUT, *request.subject, base.schedule.prediction.name)
        rows = {}
        for steps in options.steps:
            lora = LoraFile(dict(states[steps]), training.lora_alpha, recipe, {})
            rows[str(steps)] = {
                **held_out.scores(base, subject, lora),
                "seconds": round(learned.seconds * steps / training.steps, 1),
            }
        return rows

    found: dict[str, dict[str, float]] = held_out.kept(path, measure)
    return found


if __name__ == "__main__":
    main()
