"""`hollow benchmark`."""

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..progress import Clock, Progress
from .app import app, console
from .options import ClipModel, Device, DinoModel, Json, Precision, PredictionType, device_of, load_model
from .watch import quiet, stopping, watching

if TYPE_CHECKING:
    from ..evaluation.benchmark import Method, Row


class DatasetName(str, Enum):
    """The papers' two data sets."""

    dreambooth = "dreambooth"
    customconcept101 = "customconcept101"


@app.command()
def benchmark(
    dataset: Annotated[DatasetName, typer.Argument(help="Whose folders and prompts --data has.")],
    data: Annotated[Path, typer.Option(help="A clone of github.com/google/dreambooth, or the folder customconcept101 of github.com/adobe-research/custom-diffusion with its pictures.")],
    model: Annotated[Path, typer.Option(help="A .safetensors checkpoint of SD 1.x, 2.x or SDXL, or a diffusers folder.")],
    out: Annotated[Path, typer.Option(help="Folder for everything; the same command goes on there.")] = Path("hollow-benchmark"),
    method: Annotated[list[str] | None, typer.Option(help="lora-r128, hollowed-k3-r128 and the like; may be given several times. (default: lora-r128, lora-r1, hollowed-k3-r128)")] = None,
    subject: Annotated[list[str] | None, typer.Option(help="A subject's name; may be given several times. (default: all)")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each subject by each method, with the seeds 0, 1, ….")] = 4,
    images: Annotated[int, typer.Option(min=1, help="Pictures a prompt.")] = 4,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    learning_rate: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 1e-4,
    samples: Annotated[int, typer.Option(help="Records to precompute.")] = 1000,
    class_images: Annotated[int, typer.Option(min=0, help="Pictures of each class for prior preservation; 0 does without.")] = 1000,
    resolution: Annotated[int | None, typer.Option(help="Side of the square pictures in pixels. (default: the model's own)")] = None,
    precision: Annotated[Precision, typer.Option(help="Of the base model and the arithmetic.")] = Precision.fp32,
    sampling_steps: Annotated[int, typer.Option(help="Denoising steps of a picture.")] = 50,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance.")] = 7.5,
    prediction_type: PredictionType = None,
    dino: DinoModel = None,
    clip: ClipModel = None,
    device: Device = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Repeat the paper's Table 1. Press Ctrl-C to stop; the same command goes on, and prints what is done.

    Under `accelerate launch` each process takes every n-th class; all write into the same folder.
    """
    quiet()
    import torch
    from accelerate import PartialState

    from ..evaluation import benchmark as bench
    from ..evaluation import scores
    from ..evaluation.datasets import load_subjects
    from ..sampling.sample import SampleSettings
    from ..training.settings import TrainSettings

    protocol = bench.Protocol(
        images=images,
        resolution=resolution,
        samples=samples,
        class_images=class_images,
        training=TrainSettings(steps=steps, learning_rate=learning_rate, precision=precision.value, save_every=100),
        sampling=SampleSettings(steps=sampling_steps, guidance=guidance),
    )
    state = PartialState(cpu=device_of(device) == "cpu")
    to = device_of(device) if state.num_processes == 1 else str(state.device)
    methods = [bench.Method.parse(name) for name in dict.fromkeys(method or bench.TABLE_1)]
    subjects = load_subjects(dataset.value, data, subject or ())
    judge = scores.load(dino or scores.DINO, clip or scores.CLIP)
    if state.is_main_process:
        bench.check_protocol(out, protocol, model=model.resolve().name, dataset=dataset.value, scorers=judge.digest)
    jobs = bench.make_jobs(out, methods, range(seeds), subjects)
    own = bench.share(jobs, state.process_index, state.num_processes)
    todo = [job for job in own if not job.result.exists()]
    before, finished = len(own) - len(todo), True
    clock = Clock(before, len(own))
    with watching() as bars, stopping() as stop:
        watch = bars if state.is_main_process else lambda stage, done: None
        watch("jobs", Progress(before, len(own), 0.0))
        for number, job in enumerate(todo, start=before + 1):
            finished = bench.run_job(
                job,
                lambda: load_model(model, precision, prediction_type),
                judge,
                protocol,
                device=to,
                progress=watch,
                stop=stop,
            )
            if not finished:
                break
            watch("jobs", clock(number))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not finished:
        console.print("Stopped. The same command goes on from here.")
    if state.is_main_process or all(job.result.exists() for job in jobs):  # the last has the whole of it
        rows, memory = bench.table(jobs), bench.training_bytes(str(model), methods, protocol)
        if as_json:
            print(json.dumps([{"method": row.method.name, "jobs_done": row.done, "jobs": row.jobs, "training_bytes": memory[row.method], **row.scores} for row in rows], indent=1))  # fmt: skip
        else:
            Console().print(_table(rows, memory))
    if not finished:
        raise typer.Exit(130)


def _table(rows: "Sequence[Row]", memory: "Mapping[Method, int]") -> Table:
    """As the paper's Table 1; ± is the deviation of the seeds' means."""
    table = Table("method", "GiB", "DINO", "CLIP-I", "CLIP-T", "done", title="training memory by a dry run, and scores")
    for row in rows:
        scores = [
            _number(mean) + ("" if spread is None else f" ±{_number(spread)}") for mean, spread in row.scores.values()
        ]
        done = f"{row.done}/{row.jobs}"
        table.add_row(row.method.name, f"{memory[row.method] / 2**30:.2f}", *(scores or ["–"] * 3), done)
    return table


def _number(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1)
