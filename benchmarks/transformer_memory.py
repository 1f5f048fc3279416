"""Memory of transformers at their public sizes, by dry runs: `python -m benchmarks.transformer_memory`.

Every row is a run's real code on tensors without data: the peak of each stage in GiB, the disk of a record, and the
operations of a training step, beside those of an ordinary LoRA. The peers' and the papers' figures stand beside them.
The tables go to benchmarks/results/TRANSFORMERS-MEMORY.md. Not counted is what cuDNN borrows while the VAE runs, and
what a GPU's own driver takes.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch

from hollow_core.memory.planner import GIB, Planner
from hollow_core.memory.setting import Setting
from hollow_core.nets.network import at_cut, cut_in_words
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
    out: float | tuple[int, int] | None = None
    """The share of the parameters that is taken out, or a cut; None for an ordinary LoRA."""
    known: str = ""
    """What others found, or a goal."""


@dataclass(frozen=True)
class Model:
    """A layout, the side of its pictures, and its rows."""

    title: str
    layout: str
    resolution: int
    rows: tuple[Row, ...]


def usual(known: str = "") -> tuple[Row, ...]:
    """Plain, hollowed, and with every lever."""
    return (
        Row("plain LoRA, bf16", PLAIN),
        Row("50 % out, bf16", PLAIN, HALF),
        Row("50 % out, 8 bits, checkpointing", RESIDENT, HALF),
        Row("50 % out, 8 bits, checkpointing, streamed", SMALL, HALF, known),
    )


BLOCKS = (19, 9)
"""Of FLUX.1's 57 blocks: all that are double, which are large, and of the back so many that half is out. The paper
does not say which it took out; its figures ask for more than half of the parameters."""

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
            Row("half of the blocks out, bf16", PLAIN, BLOCKS, "paper 12.85"),
            Row(
                "half of the blocks out, bf16, patches of 256",
                replace(PLAIN, resolution=PATCHES),
                BLOCKS,
                "paper 10.42",
            ),
            Row("50 % out, bf16", PLAIN, HALF),
            Row("50 % out, 8 bits, checkpointing", RESIDENT, HALF),
            Row("50 % out, 8 bits, checkpointing, streamed", SMALL, HALF, "goal 4"),
        ),
    ),
    Model("Anima at 1024 × 1024", "anima", 1024, usual("goal 1.5; peers 1.84, training alone")),
    Model("Z-Image at 1024 × 1024", "z-image", 1024, usual("goal 3; peers 8.1, training alone")),
    Model("Qwen-Image at 1024 × 1024", "qwen-image", 1024, usual()),
    Model("Stable Diffusion 3.5 medium at 1024 × 1024", "sd35-medium", 1024, usual()),
    Model("Krea 2 at 1024 × 1024", "krea2", 1024, usual()),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=[each.layout for each in MODELS], help="which (default all)")
    options = parser.parse_args()
    kept = RESULTS.read_text(encoding="utf-8").split("\n## ")[1:] if RESULTS.exists() else []
    sections = {section.partition("\n")[0]: section.strip() for section in kept}
    for model in MODELS:
        if options.models is None or model.layout in options.models:
            sections[model.title] = "\n".join([model.title, *table(model)])
            print(sections[model.title], flush=True)
            known = [f"## {sections[each.title]}" for each in MODELS if each.title in sections]
            head = HEAD.format(torch=torch.__version__.partition("+")[0], diffusers=diffusers.__version__)
            RESULTS.write_text("\n\n".join([head, *known]) + "\n", encoding="utf-8")


HEAD = """# Memory of transformers

Made by `python -m benchmarks.transformer_memory` with torch {torch} and diffusers {diffusers}: dry runs at the public
sizes (hollow_core/models/layouts/README.md), rank 16 on the attention, batch 1, AdamW, records in the network's own
kind of number. GiB on the GPU at each stage's fullest moment; of main memory a number for each stage, weights and
records alone."""


def table(model: Model) -> list[str]:
    """Of markdown."""
    begun, planner = time.process_time(), Planner(model.layout)
    columns = ["setting", "cut", *STAGES, "main memory", "a record, MiB", "TFLOP a step", "known"]
    lines = ["", _line(columns), "|---" * len(columns) + "|"]
    for row in model.rows:
        cut = planner.network.nearest_cut(row.out) if isinstance(row.out, float) else row.out
        targets = at_cut(planner.network, cut, None).targets.attention
        training = replace(row.setting.training, targets=targets)
        side = row.setting.resolution or model.resolution
        setting = replace(row.setting, cut=cut, resolution=side, training=training)
        peaks = [planner.peak(stage, setting) for stage in STAGES]
        cells = [row.name, "" if cut is None else cut_in_words(cut)]
        cells += [f"{peak.total / GIB:.2f}" for peak in peaks]
        cells.append(", ".join(f"{peak.main_memory / GIB:.1f}" for peak in peaks))
        cells.append(f"{planner.store_bytes(setting) / setting.samples / 2**20:.1f}")
        lines.append(_line([*cells, f"{planner.step_flops(setting) / 1e12:.1f}", row.known]))
    return [*lines, "", f"Planned in {time.process_time() - begun:.0f} s of one CPU core."]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
