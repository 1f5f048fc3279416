"""The whole road for real, on random weights of a true shape: `python -m benchmarks.road --layout sd21`.

Each setting goes from pictures to a LoRA and back to a picture in a process of its own, on the GPU if there is one.
The table has each stage's peak of memory, as predicted by a dry run and as measured, and a training step's time over
the first setting's. On a GPU the peak is what tensors take (`torch.cuda.max_memory_allocated`); on a CPU it is the
whole process, which says little of a stage.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from benchmarks.memory import randomize
from hollow_core.data.images import TrainingImage
from hollow_core.lora import file as lora_file
from hollow_core.memory.planner import GIB, STAGES, Planner
from hollow_core.memory.setting import Setting
from hollow_core.models.base_model import BaseModel, outline
from hollow_core.models.layouts import LAYOUTS
from hollow_core.models.model import Model
from hollow_core.progress import Progress
from hollow_core.road import Request, personalize
from hollow_core.sampling.sample import SampleSettings, sample
from hollow_core.training.settings import DTYPES, TrainSettings

HALF = TrainSettings(precision="bf16")
SETTINGS = {
    "plain": Setting(None),
    "k=3": Setting(3),
    "k=5": Setting(5),
    "plain, bf16": Setting(None, training=HALF),
    "k=3, bf16": Setting(3, training=HALF),
    "k=5, bf16": Setting(5, training=HALF),
    "k=3, bf16, checkpointing": Setting(3, training=replace(HALF, gradient_checkpointing=True)),
    "k=3, bf16, 8-bit base": Setting(3, base_bits=8, training=HALF),
    "k=3, bf16, 4-bit base": Setting(3, base_bits=4, training=HALF),
    "k=3, bf16, bf16 LoRA": Setting(3, training=replace(HALF, lora_precision="bf16")),
    "k=3, bf16, 8-bit AdamW": Setting(3, training=replace(HALF, optimizer="adamw8bit")),
    "k=3, bf16, fused backward": Setting(3, training=replace(HALF, fused_backward=True, max_grad_norm=float("inf"))),
    "k=3, bf16, streamed middle, tiled VAE": Setting(3, stream_middle=True, tiled_vae=True, training=HALF),
    "k=3, bf16, streamed": Setting(3, streaming=True, training=HALF),
    "k=3, bf16, checkpointing, streamed": Setting(
        3, streaming=True, training=replace(HALF, gradient_checkpointing=True)
    ),
}
RECORDS = 4  # the peaks are those of any number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="sd21")
    parser.add_argument("--resolution", type=int, help="side of the pictures in pixels (default the model's own)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA (default 16)")
    parser.add_argument("--steps", type=int, default=20, help="steps to time, after two that are not (default 20)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="which (default all)")
    parser.add_argument("--one", choices=SETTINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        setting = setting_of(options, options.one)
        model = partial(outline, options.layout, DTYPES[setting.training.precision])
        print(json.dumps(measured(lambda: random_model(model()), setting, device)))
        return
    planner, first = Planner(options.layout), 0.0
    print("| setting | " + " | ".join(f"{stage}: predicted, is" for stage in STAGES) + " | step, s | over the first |")
    print("|---" * (len(STAGES) + 3) + "|")
    for name in options.settings:
        command = [sys.executable, "-m", "benchmarks.road", *sys.argv[1:], "--one", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        predicted = planner.predict(setting_of(options, name))
        first = first or found["step"]
        peaks = [f"{predicted.stages[stage].total / GIB:.2f}, {found[stage]:.2f}" for stage in STAGES]
        print(f"| {name} | {' | '.join(peaks)} | {found['step']:.4f} | {found['step'] / first:.2f} |", flush=True)


def setting_of(options: argparse.Namespace, name: str) -> Setting:
    """The setting at the rank and resolution asked for."""
    setting = SETTINGS[name]
    training = replace(setting.training, rank=options.rank, steps=options.steps + 2)
    return replace(setting, resolution=options.resolution, samples=RECORDS, training=training)


def measured(make: Callable[[], BaseModel], setting: Setting, device: torch.device) -> dict[str, float]:
    """Peak GiB of each of `STAGES`, and the median seconds of a training "step"; `make` gives a model on the CPU."""
    ready = [make()]  # before the first stage, whose peak is not to have what making takes
    side = setting.resolution or ready[0].resolution
    picture = TrainingImage(Image.new("RGB", (side, side), "teal"), None, "", (0, 0, side, side))
    request = Request([picture], "dog", setting=setting)
    moments: list[float] = []

    def watch(stage: str, done: Progress) -> None:
        if stage == "train":
            if device.type == "cuda":
                torch.cuda.synchronize()
            moments.append(time.monotonic())

    with tempfile.TemporaryDirectory() as folder:
        outcome = personalize(ready.pop, request, Path(folder), device=device, progress=watch)
        assert outcome.file is not None
        model = make()
        lora = lora_file.load(outcome.file, model.unet)
    with outcome.meter.stage("sample"):
        draw_one(model, setting, lora, device, side)
    peaks = {stage.name: stage.peak_bytes / GIB for stage in outcome.meter.stages}
    return peaks | {"step": median(after - before for before, after in pairwise(moments[1:]))}


def draw_one(model: BaseModel, setting: Setting, lora: lora_file.LoraFile, device: torch.device, side: int) -> None:
    """A picture in two steps, with the base small or away as in training."""
    setting.keep_small(model, device)
    sample(model, ["a photo of a sks dog"], [0], SampleSettings(steps=2, size=(side, side)), lora=lora, device=device)


def random_model(model: Model, device: torch.device | str = "cpu") -> BaseModel:
    """The model of an outline, on the CPU, with weights that mean nothing; `device` draws them."""
    assert isinstance(model, BaseModel)
    generator = torch.Generator(device).manual_seed(0)
    for part in (model.unet, model.vae, *model.text_encoders):
        assert part is not None
        randomize(part, generator)
        part.to("cpu")
    return model


if __name__ == "__main__":
    main()
