"""Memory of transformers at their public sizes, by dry runs: `python -m benchmarks.transformer_memory`.

Every row is a run's real code on tensors without data: the peak of each stage in GiB, the disk of a record, and the
operations of a training step, beside those of an ordinary LoRA. The peers' and the papers' figures stand beside them.
The tables go to benchmarks/results/TRANSFORMERS-MEMORY.md. Not counted is what cuDNN borrows while the VAE runs, and what
a GPU's own driver takes.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch

from hollow_core.memory.planner import GIB, Planner
from hollow_core.memory.setting import Setting
from hollow_core.training.settings import TrainSettings

RESULTS = Path(__file__).parent / "results" / "TRANSFORMERS-MEMORY.md"
STAGES = ("encode", "precompute", "train")

LORA = TrainSettings(rank=16, precision="bf16")
PLAIN = Setting(None, training=LORA)
SMALL = Setting(base_bits=8, streaming=True, tiled_vae=True, training=replace(LORA, gradient_checkpointing=True))
RESIDENT = replace(SMALL, streaming=False, stream_middle=True)

HALF = 0.5
"""Of the parameters that a cut takes out."""


@dataclass(frozen=True)
class Row:
    """A setting, and what is known beside it."""

    name: str
    setting: Setting
    share: float | None = None
    """Of the parameters that is taken out; None for an ordinary LoRA."""
    known: str = ""
    """What others found, or a goal."""


@dataclass(frozen=True)
class Model:
    """A layout, the side of its pictures, and its rows."""

    title: str
    layout: str
    resolution: int
    rows: tuple[Row, ...]


def usual(goal: str, peers: str = "") -> tuple[Row, ...]:
    """Plain, hollowed, and with every lever."""
    return (
        Row("plain LoRA, bf16", PLAIN),
        Row("plain LoRA, 8 bits, checkpointing, streamed", SMALL, None, peers),
        Row("50 % out, bf16", PLAIN, HALF),
        Row("50 % out, 8 bits, checkpointing", RESIDENT, HALF),
        Row("50 % out, 8 bits, checkpointing, streamed", SMALL, HALF, goal),
    )


PATCHES = 256
"""Side of the paper's patches of 512 pixels."""

MODELS = (
    Model(
        "FLUX.1 at 512 × 512",
        "flux",
        512,
        (
            Row("plain LoRA, bf16", PLAIN, None, "paper 35.99"),
            Row("plain LoRA, bf16, patches of 256", replace(PLAIN, resolution=PATCHES), None, "paper 30.48"),
            Row("50 % out, bf16", PLAIN, HALF, "paper 12.85"),
            Row("50 % out, bf16, patches of 256", replace(PLAIN, resolution=PATCHES), HALF, "paper 10.42"),
            Row("plain LoRA, 8 bits, checkpointing, streamed", SMALL),
            Row("50 % out, 8 bits, checkpointing", RESIDENT, HALF),
            Row("50 % out, 8 bits, checkpointing, streamed", SMALL, HALF, "goal 4"),
        ),
    ),
    Model("Anima at 1024 × 1024", "anima", 1024, usual("goal 1.5", "peers 1.84, training alone")),
    Model("Z-Image at 1024 × 1024", "z-image", 1024, usual("goal 3", "peers 8.1, training alone")),
    Model("Qwen-Image at 1024 × 1024", "qwen-image", 1024, usual("")),
    Model("Stable Diffusion 3.5 medium at 1024 × 1024", "sd35-medium", 1024, usual("")),
    Model("Krea 2 at 1024 × 1024", "krea2", 1024, usual("")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=[each.layout for each in MODELS], help="which (default all)")
    options = parser.parse_args()
    parts = [HEAD.format(torch=torch.__version__.partition("+")[0], diffusers=diffusers.__version__)]
    for model in MODELS:
        if options.models is None or model.layout in options.models:
            parts.append("\n".join(table(model)))
            print(parts[-1], flush=True)
    if options.models is None:
        RESULTS.write_text("\n\n".join(parts) + "\n")


HEAD = """# Memory of transformers

Made by `python -m benchmarks.transformer_memory` with torch {torch} and diffusers {diffusers}: dry runs at the public
sizes (hollow_core/models/layouts/README.md), rank 16 on the attention, batch 1, AdamW, records in the network's own
kind of number. GiB on the GPU at each stage's fullest moment."""


def table(model: Model) -> list[str]:
    """Of markdown."""
    begun, planner = time.process_time(), Planner(model.layout)
    lines = [
        f"## {model.title}",
        "",
        "| setting | cut | " + " | ".join(STAGES) + " | a record, MiB | TFLOP a step | known |",
    ]
    lines.append("|---" * (len(STAGES) + 5) + "|")
    for row in model.rows:
        cut = None if row.share is None else planner.network.nearest_cut(row.share)
        setting = replace(row.setting, cut=cut, resolution=row.setting.resolution or model.resolution)
        peaks = [f"{planner.peak(stage, setting).total / GIB:.2f}" for stage in STAGES]
        record = planner.store_bytes(setting) / setting.samples / 2**20
        told = "" if cut is None else ",".join(map(str, cut)) if isinstance(cut, tuple) else str(cut)
        flops = planner.step_flops(setting) / 1e12
        lines.append(f"| {row.name} | {told} | {' | '.join(peaks)} | {record:.1f} | {flops:.1f} | {row.known} |")
    lines += ["", f"Planned in {time.process_time() - begun:.0f} s of one CPU core."]
    return lines


if __name__ == "__main__":
    main()
