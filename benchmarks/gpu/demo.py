"""The demo: does it learn on this device what it learns on a CPU, and the same twice."""

from pathlib import Path

import torch

from hollow_core.demo import run, world
from hollow_core.files import read_safetensors
from hollow_core.training.settings import TrainSettings

from .measurement import Figures

ON_A_CPU = {
    "base model, subject": 0.0102,
    "plain LoRA, subject": 0.8180,
    "hollowed LoRA, two paths, subject": 0.9024,
    "hollowed LoRA, single path, subject": 0.9062,
    "base model, prompt": 0.9993,
    "plain LoRA, prompt": 0.9996,
    "hollowed LoRA, two paths, prompt": 0.9997,
    "hollowed LoRA, single path, prompt": 0.9995,
}
"""Scores in the report of `hollow demo` on a CPU, with torch 2.13 and diffusers 0.42.1."""


def measure_scores(folder: Path, settings: TrainSettings, device: torch.device) -> Figures:
    """The report's scores, and the seconds of its stages."""
    report = run.run(folder, settings=settings, device=device)
    seconds = {
        f"{way}, {stage['name']}, s": stage["seconds"]
        for way in ("plain", "hollowed")
        for stage in report[f"{way}_stages"]
    }
    scores = {
        f"{name}, {of}": row[f"{of}_score"] for of in ("subject", "prompt") for name, row in report["rows"].items()
    }
    return scores | seconds


def measure_repetition(folder: Path, settings: TrainSettings, device: torch.device) -> Figures:
    """How far the demo's hollowed LoRA is from another of the same seed and class pictures, trained anew."""
    if not (folder / "work" / "hollowed" / run.LORA_FILE).exists():
        run.run(folder, settings=settings, device=device)
    first, second, shared = folder / "work" / "hollowed", folder / "again", folder / "work" / "class"
    subject, references = world.HELD_OUT[0], folder / "references"
    run.train(second, references, subject, run.CUT, settings, class_folder=shared, device=device)
    one, other = (read_safetensors(each / run.LORA_FILE)[0] for each in (first, second))
    return {
        "largest difference": max((one[key].float() - other[key].float()).abs().max().item() for key in one),
        "largest number": max(tensor.float().abs().max().item() for tensor in one.values()),
    }
