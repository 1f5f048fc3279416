"""The demo: does it learn on this device what it learns on a CPU, and the same twice."""

from pathlib import Path

import torch

from hollow_core.demo import run, world
from hollow_core.files import read_safetensors

from .measurement import Figures

ON_A_CPU = {
    "base model, subject": 0.0102,
    "plain LoRA, subject": 0.7538,
    "hollowed LoRA, two paths, subject": 0.8768,
    "hollowed LoRA, single path, subject": 0.8885,
    "base model, prompt": 0.9993,
    "plain LoRA, prompt": 0.9996,
    "hollowed LoRA, two paths, prompt": 0.9997,
    "hollowed LoRA, single path, prompt": 0.9996,
}
"""Scores in the report of `hollow demo` on a CPU, with torch 2.13 and diffusers 0.42.1."""


def measure_scores(folder: Path, device: torch.device) -> Figures:
    """The report's scores, and the seconds of its stages."""
    report = run.run(folder, device=device)
    seconds = {
        f"{way}, {stage['name']}, s": stage["seconds"]
        for way in ("plain", "hollowed")
        for stage in report[f"{way}_stages"]
    }
    scores = {
        f"{name}, {of}": row[f"{of}_score"] for of in ("subject", "prompt") for name, row in report["rows"].items()
    }
    return scores | seconds


def measure_repetition(folder: Path, device: torch.device) -> Figures:
    """How far the demo's hollowed LoRA is from another of the same seed, of the same class pictures, trained anew."""
    run.run(folder, device=device)  # which is there, in parts or whole
    subject = world.HELD_OUT[0]
    first, second = folder / "work" / "hollowed", folder / "again"
    run.train(second, folder / "references", subject, run.CUT, class_folder=folder / "work" / "class", device=device)
    one, other = (read_safetensors(each / run.LORA_FILE)[0] for each in (first, second))
    apart = max((one[key].float() - other[key].float()).abs().max().item() for key in one)
    largest = max(tensor.float().abs().max().item() for tensor in one.values())
    return {"largest difference of two trainings": apart, "largest number in the LoRA": largest}
