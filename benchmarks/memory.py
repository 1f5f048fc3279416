"""Predicted memory against the paper's, and against what a real run takes here: `python -m benchmarks.memory`.

The first table is the paper's: Stable Diffusion 2.1 at 512 pixels in fp32 (Hollowed Net, Tables 1 to 3). The
second shows how far down the levers of memory reach. The third compares our 8 and 4 bits with a base that ComfyUI
keeps quantised: it does so with linear layers alone. The fourth trains a U-Net of SD 1.5's shape with random weights
on the CPU, each setting in a process of its own, and compares how much its resident memory grew with what the dry
run says.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from hollow_core.memory.dry_run import DryRun
from hollow_core.memory.meter import used_bytes
from hollow_core.memory.planner import GIB, STAGES, Planner
from hollow_core.memory.setting import Setting
from hollow_core.memory.stages import OneRecord
from hollow_core.models.base_model import BaseModel, outline
from hollow_core.nets.network import at_cut
from hollow_core.nets.residency import Bits
from hollow_core.training.settings import TrainSettings
from hollow_core.training.train import train

PUBLISHED = {
    "plain LoRA, rank 128": (None, 128, 5.23),
    "plain LoRA, rank 16": (None, 16, 4.883),
    "plain LoRA, rank 4": (None, 4, 4.847),
    "plain LoRA, rank 1": (None, 1, 4.84),
    "hollowed at k=3, rank 128": (3, 128, 3.88),
    "hollowed at k=3, rank 16": (3, 16, 3.558),
    "hollowed at k=3, rank 4": (3, 4, 3.526),
    "hollowed at k=4 (56.6 %), rank 128": (4, 128, 3.16),
}
"""{row: (cut, rank, GiB)}"""

INFERENCE = 3.48
"""GiB that the paper's base model takes to draw."""

SD21 = Setting(3, 512)
SDXL = Setting(1, 1024)
SMALL = TrainSettings(rank=16, precision="bf16", gradient_checkpointing=True)

REACH: dict[str, tuple[str, Setting, tuple[str, ...], float]] = {
    "SD2.1 k=3, rank 128, fp32": ("sd21", replace(SD21, training=TrainSettings(rank=128)), ("train",), 3.80),
    "rank 16, bf16, checkpointing": ("sd21", replace(SD21, training=SMALL), ("train",), 1.25),
    "rank 128, bf16, checkpointing, 8-bit base, 8-bit AdamW": (
        "sd21",
        replace(SD21, base_bits=8, training=replace(SMALL, rank=128, optimizer="adamw8bit")),
        ("train",),
        1.00,
    ),
    "rank 16, bf16, checkpointing, 8-bit base": ("sd21", replace(SD21, base_bits=8, training=SMALL), ("train",), 0.80),
    "rank 16, bf16, checkpointing, streamed": ("sd21", replace(SD21, streaming=True, training=SMALL), ("train",), 0.45),
    "the same, whole road": (
        "sd21",
        replace(SD21, streaming=True, class_images=1, training=SMALL),
        STAGES,
        0.90,
    ),
    "SDXL k=1, rank 16, bf16, checkpointing": ("sdxl", replace(SDXL, training=SMALL), ("train",), 3.2),
    "SDXL, streamed": ("sdxl", replace(SDXL, streaming=True, training=SMALL), ("train",), 1.5),
    "SDXL, streamed, tiled VAE, whole road": (
        "sdxl",
        replace(SDXL, streaming=True, tiled_vae=True, class_images=1, training=SMALL),
        STAGES,
        1.5,
    ),
}
"""{row: (model, setting, stages of which the fullest counts, goal in GiB)}"""

COMFYUI_BITS = {"fp8 or INT8": 8.0, "NVFP4": 4.5}
"""What a weight of a linear layer takes in ComfyUI's quantised checkpoints, block scales included."""

FREE_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Lets glibc give back to the system what a tensor leaves, as it otherwise keeps it for later."""

CPU = Setting(training=TrainSettings(rank=16, steps=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="side of the CPU's pictures in pixels (default 256)")
    parser.add_argument("--dry-only", action="store_true", help="leave out the runs on the CPU")
    parser.add_argument("--one", choices=("plain", "hollowed"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    setting = replace(CPU, resolution=options.size)
    if options.one:
        print(json.dumps(grown(setting if options.one == "hollowed" else replace(setting, cut=None))))
        return
    print("SD2.1, 512 pixels, fp32: peak in GiB")
    report("inference", inference(), INFERENCE)
    planner = Planner("sd21")
    for name, (cut, rank, published) in PUBLISHED.items():
        report(name, training(planner, cut, rank), published)
    print("Reach, batch 1: GiB\n| | predicted | goal |\n|---|---|---|")
    planners = {"sd21": planner, "sdxl": Planner("sdxl")}
    for name, (model, _, _, goal) in REACH.items():
        found = reach(planners[model], name)
        missed = f", missed by {found - goal:.2f}" if found > goal else ""
        print(f"| {name} | {found:.2f} | {goal:.2f}{missed} |", flush=True)
    print("Frozen base, training in bf16 with checkpointing, rank 16: GiB")
    for model, setting in (("sd21", SD21), ("sdxl", SDXL)):
        for kept, found in frozen_base(planners[model], model, replace(setting, training=SMALL)).items():
            print(f"{model} k={setting.cut}, {kept:24} {found:.2f}", flush=True)
    if options.dry_only:
        return
    print(f"SD1.5, {options.size} pixels, rank 16, fp32, on this CPU: resident GiB of a training")
    planner = Planner("sd15")
    for kind in ("plain", "hollowed"):
        command = [sys.executable, "-m", "benchmarks.memory", "--size", str(options.size), "--one", kind]
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | FREE_AT_ONCE)
        peak = planner.predict(setting if kind == "hollowed" else replace(setting, cut=None)).stages["train"]
        predicted = (peak.total - peak.bytes["workspace"]) / GIB  # there is no cuBLAS
        report(kind, predicted, json.loads(run.stdout.splitlines()[-1]) / GIB)


def report(name: str, predicted: float, other: float) -> None:
    print(f"{name:36} predicted {predicted:.3f}   is {other:.3f}   {100 * (predicted / other - 1):+.1f} %", flush=True)


def inference() -> float:
    """GiB of the U-Net alone, on a prompt and the empty prompt at once (classifier-free guidance)."""
    network = outline("sd21").network
    unet, (latents, prompt) = network.module, network.inputs(64, 64)
    with DryRun() as run, torch.no_grad():
        run.hold("weights", unet)
        unet(latents.to("meta").repeat(2, 1, 1, 1), 0, prompt.encoder_hidden_states.to("meta").repeat(2, 1, 1))
    return run.peak().total / GIB


def training(planner: Planner, cut: int | None, rank: int) -> float:
    """GiB of a training step, fp32, at batch 1."""
    return planner.peak("train", Setting(cut, 512, training=TrainSettings(rank=rank))).total / GIB


def reach(planner: Planner, row: str) -> float:
    """GiB of the fullest of the row's stages; `planner` is for its model."""
    _, setting, stages, _ = REACH[row]
    return max(planner.peak(stage, setting).total for stage in stages) / GIB


def frozen_base(planner: Planner, model: str, setting: Setting) -> dict[str, float]:
    """GiB of a training by how the frozen weights are kept: by us, or as ComfyUI's quantised layers keep them."""
    ways: dict[str, Bits | None] = {"bf16": None, "8 bit": 8, "4 bit": 4}
    kept = {name: planner.peak("train", replace(setting, base_bits=ways[name])).total / GIB for name in ways}
    part = at_cut(outline(model).network, setting.cut, timesteps=None).module
    linear = sum(layer.weight.numel() for layer in part.modules() if isinstance(layer, nn.Linear))
    return kept | {f"{name} of ComfyUI": kept["bf16"] - linear * (16 - b) / 8 / GIB for name, b in COMFYUI_BITS.items()}


def grown(setting: Setting) -> int:
    """Bytes by which this process grows while it trains on the CPU."""
    tiny = outline("sd15")
    assert isinstance(tiny, BaseModel)
    tiny.unet = UNet2DConditionModel.from_config({**tiny.unet.config, "block_out_channels": [32] * 4})
    train_for_real(tiny, replace(setting, resolution=128))  # what libraries load and keep is there from here on
    before = used_bytes()
    true = outline("sd15")
    assert isinstance(true, BaseModel)
    train_for_real(true, setting)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def train_for_real(model: BaseModel, setting: Setting) -> None:
    """On random weights, of which only those that remain are ever there."""
    store = OneRecord(model, setting)
    network = at_cut(model.network, setting.cut, range(setting.samples))
    del model
    randomize(network.module, torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        train(network, store.schedule, store, setting.training, folder=Path(folder))


def randomize(part: nn.Module, generator: torch.Generator) -> None:
    """Give an outline random weights, on the generator's device."""
    part.to_empty(device=generator.device)
    for tensor in [*part.parameters(), *part.buffers()]:
        if tensor.is_floating_point():
            tensor.data.normal_(std=0.02, generator=generator)
        else:  # the numbers of a prompt's tokens
            tensor.data.copy_(torch.arange(tensor.shape[-1]))


if __name__ == "__main__":
    main()
