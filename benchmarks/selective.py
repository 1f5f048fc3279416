"""Backpropagation, MeZO and their mixture: `python -m benchmarks.selective --out DIR`.

Eight ways to train on the six held-out subjects of the embedded model, with the same number of steps and, once more,
in the same time as backpropagation at full size: subject, scene and structure score of pictures in new scenes (on two
paths where hollowed). Structure is the embedded reader's probability of the subject's class. What is done is kept in
DIR, so that a stopped run goes on; `--subjects 1 --steps 100` is a small run. Writes DIR/selective.json with the
peak of a dry run and the operations of a step for SD1.5 at 512², BP-low at 256², and prints the tables.
"""

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copytree
from statistics import mean
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel

from hollow_core import lora_file
from hollow_core.blocks import exit_shape, layout_config
from hollow_core.demo import run, scorers, world
from hollow_core.dry_run import DryRun
from hollow_core.files import read_json, write_json
from hollow_core.hollow import hollow
from hollow_core.images import load_images
from hollow_core.lora import add_lora, lora_parameters
from hollow_core.personalize import Request, personalize
from hollow_core.selective import Probability, Strategy, count_by_time, falling, heat_map
from hollow_core.steps import Step, ZerothOrder, backpropagate

SEEDS_A_SCENE = 3
ZO_LEARNING_RATE = 1e-4
RANK = 16


class Way(NamedTuple):
    """One way to train."""

    strategy: Strategy
    cut: int | None = None
    gamma: float = 1.0
    probability: Probability | None = None


def first_half(t: float, s: float) -> float:
    """p(BP-low) of ZO-high after BP-low."""
    return float(s < 0.5)


WAYS = {
    "BP at full size": Way("bp"),
    "BP-low only": Way("selective", gamma=0.0),
    "ZO-high from scratch": Way("zo"),
    "ZO-high after BP-low": Way("selective", probability=first_half),
    "selective, γ = 0.5": Way("selective", gamma=0.5),
    "selective, γ = 1": Way("selective"),
    "selective, γ = 3": Way("selective", gamma=3.0),
    "hollowed": Way("bp", run.CUT),
    "selective, γ = 1, hollowed": Way("selective", run.CUT),
}


SD15_WAYS = {
    "BP at 512²": ["bp"],
    "BP-low at 256²": ["bp-low"],
    "ZO-high at 512²": ["zo-high"],
    "selective, γ = 1": ["bp-low", "zo-high"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hollow-selective"), help="folder for the results")
    parser.add_argument("--subjects", type=int, default=6, help="how many of the six (default all)")
    parser.add_argument("--steps", type=int, default=run.SETTINGS.steps, help="of BP at full size (default the demo's)")
    parser.add_argument("--zo-learning-rate", type=float, default=ZO_LEARNING_RATE, help="of zeroth-order steps")
    options = parser.parse_args()
    peaks = [sd15_peak(way, cut) for cut in (None, run.CUT) for way in SD15_WAYS]
    print("\n| SD1.5, rank 16, fp32 | peak, GiB | TFLOP a step |\n|---|---|---|")
    for row in peaks:
        print(f"| {row['way']} | {row['peak_GiB']:.2f} | {row['tflop']:.2f} |", flush=True)
    results: dict[str, Any] = {"sd15": peaks, "subjects": []}
    for number, subject in enumerate(world.HELD_OUT[: options.subjects]):
        results["subjects"].append(subject_scores(options, number, subject))
        write_json(options.out / "selective.json", results)
    for budget in ("same steps", "same time"):
        print(f"\n| {budget} | subject | scene | structure | steps | seconds |\n|---|---|---|---|---|---|")
        for name in WAYS:
            rows = [result[budget][name] for result in results["subjects"]]
            figures = (
                mean(row[what] for row in rows) for what in ("subject", "scene", "structure", "steps", "seconds")
            )
            print("| {} | {:.3f} | {:.3f} | {:.3f} | {:.0f} | {:.0f} |".format(name, *figures))


def subject_scores(options: argparse.Namespace, number: int, subject: world.Subject) -> dict[str, Any]:
    """{"same steps" or "same time": {way: scores}} for one subject; read back where it was measured before."""
    folder = options.out / f"subject-{number}"
    run.write_references(folder / "references", subject)
    measured: dict[str, Any] = {"same steps": {}, "same time": {}}
    seconds = 0.0
    for budget, rows in measured.items():
        for name, way in WAYS.items():
            steps = options.steps
            if budget == "same time":
                steps = max(round(seconds / measured["same steps"][name]["seconds_a_step"]), 1)
            measure = partial(train_and_score, options, folder, subject, name, way, steps)
            rows[name] = _once(folder, f"{name}, {budget}", measure)
        seconds = rows["BP at full size"]["seconds"]
    return measured


def train_and_score(
    options: argparse.Namespace,
    folder: Path,
    subject: world.Subject,
    name: str,
    way: Way,
    steps: int,
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
    images = load_images(folder / "references", world.SIZE)
    request = Request(
        images, subject.kind, run.IDENTIFIER, way.cut, run.SAMPLES, run.CLASS_IMAGES, settings=settings
    )  # fmt: skip
    work = folder / f"{name}, {steps} steps"
    if (folder / "class").exists() and not work.exists():
        copytree(folder / "class", work / "class")  # the same pictures of the class for all
    outcome = personalize(run.model, request, work)
    if not (folder / "class").exists():
        copytree(work / "class", folder / "class")
    assert outcome.file is not None
    assert outcome.result is not None
    base, judge = run.model(), scorers.load()
    scenes = list(world.NEW_SCENES) * SEEDS_A_SCENE
    drawn = run.draw(base, run.called(subject), scenes, lora=lora_file.load(outcome.file, base.unet))
    subject_score, scene_score = run.score(drawn, subject, scenes)
    seconds = outcome.meter.stages[-1].seconds
    return {
        "subject": round(subject_score, 4),
        "scene": round(scene_score, 4),
        "structure": round(judge.class_score(drawn, [subject.kind] * len(drawn)), 4),
        "steps": steps,
        "seconds": round(seconds, 1),
        "seconds_a_step": seconds / steps,
        "steps_by_time": count_by_time(outcome.result.taken),
    }


def sd15_peak(way: str, cut: int | None) -> dict[str, Any]:
    """The peak of training by a dry run, weights and AdamW's moments included, and the operations of a step.

    Those of selective are the mean over its schedule at γ = 1.
    """
    with torch.device("meta"):
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(layout_config("sd15")).eval()
    if cut is not None:
        unet = hollow(unet, cut, [1])
    add_lora(unet, RANK, generator=torch.Generator())
    with DryRun() as dry:
        dry.hold("weights", unet)
        flops = []
        for kind in SD15_WAYS[way]:
            before = dry.flops
            _sd15_step(unet, cut, kind)
            flops.append((dry.flops - before) / 1e12)
    low = mean(mean(row) for row in heat_map(falling(1.0)))
    tflop = flops[0] if len(flops) == 1 else low * flops[0] + (1 - low) * flops[1]
    return {
        "way": way if cut is None else f"{way}, hollowed",
        "peak_GiB": dry.peak().total / 2**30,
        "tflop": tflop,
    }


def _sd15_step(unet: UNet2DConditionModel, cut: int | None, kind: str) -> None:
    """One step of a kind, with an optimizer of its own."""
    size = 32 if kind == "bp-low" else 64
    parameters = lora_parameters(unet)
    optimizer = torch.optim.AdamW(parameters)
    empty = partial(torch.empty, device="meta")
    latents, prompt = empty(1, 4, size, size), empty(1, 77, unet.config.cross_attention_dim)
    handed_in = {} if cut is None else {"exit_activation": empty(1, *exit_shape(unet.config, cut, size, size))}
    way: Step = ZerothOrder(parameters, seed=0) if kind == "zo-high" else backpropagate

    def loss(record: int) -> torch.Tensor:
        return torch.nn.functional.mse_loss(unet(latents, 1, prompt, **handed_in).sample, latents)

    way(loss, [(0, 1.0)])
    optimizer.step()
    optimizer.zero_grad()


def _once(folder: Path, name: str, measure: Any) -> dict[str, Any]:
    path = folder / f"{name}.json"
    if not path.exists():
        started = time.monotonic()
        write_json(path, measure())
        print(f"{folder.name}, {name}: {time.monotonic() - started:.0f} s", flush=True)
    row: dict[str, Any] = read_json(path)
    print({key: value for key, value in row.items() if key != "steps_by_time"}, flush=True)
    return row


if __name__ == "__main__":
    main()
