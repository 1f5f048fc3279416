"""Memory runs out in a training, and the same call goes on. `python -m benchmarks.gpu.out_of_memory` is the process
that this happens in."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from benchmarks.road import random_model
from hollow_core.data.images import TrainingImage
from hollow_core.errors import HollowError
from hollow_core.files import read_safetensors
from hollow_core.memory.planner import GIB
from hollow_core.memory.setting import Setting
from hollow_core.models.base_model import BaseModel
from hollow_core.progress import Progress
from hollow_core.request import Request
from hollow_core.road import personalize
from hollow_core.training.settings import DTYPES, TrainSettings
from hollow_core.training.train import CHECKPOINT

from .measurement import Figures
from .memory import free
from .models import Shape

BEFORE, STEPS = 3, 6
"""Steps until memory runs out, and in all."""

SETTING = Setting(3, samples=2, training=TrainSettings(steps=STEPS))

SPARE = 16 * 2**20
"""Bytes that are left for a step, which takes far more."""


def measure_out_of_memory(shape: Shape, device: torch.device) -> Figures:
    """What became of a training whose memory ran out; in a process of its own, which alone it can spoil."""
    command = [sys.executable, "-m", "benchmarks.gpu.out_of_memory", shape.layout, str(device)]
    command += ["--tiny"] * shape.tiny
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if run.returncode:
        *_, last = ["", *run.stderr.strip().splitlines()]
        raise RuntimeError(f"The process ended with {run.returncode}: {last}\n\n{run.stderr}")
    figures: Figures = json.loads(run.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layout")
    parser.add_argument("device", type=torch.device)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        print(json.dumps(_figures(Shape(options.layout, options.tiny), options.device, Path(folder))))


def _figures(shape: Shape, device: torch.device, folder: Path) -> Figures:
    full = _Full(device)

    def load() -> BaseModel:
        model = random_model(shape.outline(DTYPES[SETTING.training.precision]), device)
        model.unet.register_forward_pre_hook(full.pretend)
        free(device)
        return model

    side = shape.outline().resolution
    picture = TrainingImage(Image.new("RGB", (side, side), "teal"), None, "", (0, 0, side, side))
    request = Request([picture], "dog", setting=SETTING)
    sentence = None
    try:
        personalize(load, request, folder, device=device, progress=full.after_some_steps)
    except HollowError as error:
        sentence = str(error)
    saved = read_safetensors(folder / CHECKPOINT)[0] if (folder / CHECKPOINT).exists() else {}
    full.end()
    free(device)
    left = torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else None
    outcome = personalize(load, request, folder, device=device)
    return {
        "what was said": sentence,
        "steps in the checkpoint": len(saved.get("losses", ())),
        "left on the device by then, GiB": left,
        "steps in the end": 0 if outcome.result is None else outcome.result.steps,
        "a LoRA in the end": outcome.file is not None and outcome.file.exists(),
    }


class _Full:
    """Lets memory run out in a step, by PyTorch's limit for a process; where there is no GPU, pretends."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._now = device, False

    def after_some_steps(self, stage: str, done: Progress) -> None:
        """A `progress` of `personalize`."""
        if stage != "train" or done.step != BEFORE:
            return
        self._now = True
        if self._device.type == "cuda":
            free(self._device)  # or the step would be given what the last one had
            total = torch.cuda.get_device_properties(self._device).total_memory
            allowed = torch.cuda.memory_reserved(self._device) + SPARE
            torch.cuda.set_per_process_memory_fraction(allowed / total, self._device)

    def pretend(self, *_: Any) -> None:
        """A hook before the U-Net's forward pass."""
        if self._now and self._device.type != "cuda":
            raise torch.cuda.OutOfMemoryError("There is no GPU: this is how it would be.")

    def end(self) -> None:
        """There is enough again."""
        self._now = False
        if self._device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)


if __name__ == "__main__":
    main()
