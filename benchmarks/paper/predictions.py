"""What dry runs say of SD2.1 at 512 pixels in fp32, batch 1, with LoRA on the attention; nothing is trained for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch
from diffusers import UNet2DConditionModel

from benchmarks import held_out
from benchmarks.memory import inference
from hollow_core.demo import run, world
from hollow_core.files import read_json
from hollow_core.lora.layers import ATTENTION, add_lora, lora_parameters
from hollow_core.memory.cost import cuts_table
from hollow_core.memory.dry_run import DryRun
from hollow_core.memory.planner import GIB, Planner
from hollow_core.memory.setting import Setting
from hollow_core.models.base_model import outline
from hollow_core.models.layouts import layout_config
from hollow_core.nets.unet import UNet
from hollow_core.training.settings import TrainSettings

from .baselines import pruned
from .ways import HOLLOWED, LORA, WAYS, Way, learned

TABLE_3 = {
    "precompute a record": 0.238,
    "training step, hollowed": 2.004,
    "training step, LoRA": 2.148,
    "drawing step on two paths": 0.920,
    "drawing step on one path": 0.716,
}
"""The paper's TFLOP."""
TABLE_6 = {(0, 200): 0.08, (3, 200): 0.26, (4, 200): 0.26, (0, 1000): 0.38, (3, 1000): 1.31, (4, 1000): 1.31}
"""{(cut, records): GB}, the paper's."""


class Predicted(TypedDict):
    """JSON-ready."""

    gib: dict[str, float]
    """Training in each way, by its name; without cuts that leave next to nothing."""
    recomputed: dict[str, float]
    """The same with gradient checkpointing, of two of them."""
    inference: float
    """GiB of drawing with the U-Net alone."""
    operations: dict[str, int]
    """As in `TABLE_3`."""
    fp32_storage: list[list[int]]
    """(cut, records, bytes) as in `TABLE_6`."""
    removed: dict[str, list[float]]
    """Per cent of the parameters at each cut, of "sd21" and of the "embedded" model."""


def predictions(out: Path) -> Predicted:
    """Read back from `out` where they were made before; a minute."""
    changed = out / "most-changed.json"
    blocks = read_json(changed) if changed.exists() else []
    name = "predicted.json" if blocks else "predicted-without-the-most-changed.json"
    found: Predicted = held_out.kept(out / name, lambda: _predict(blocks))
    return found


def _predict(most_changed: Sequence[str]) -> Predicted:
    planner = Planner("sd21")
    sd21, embedded = (
        cuts_table(base.network, base.latent_side, base.latent_side)
        for base in (outline("sd21"), outline(str(run.MODEL)))
    )
    flops, worthwhile = sd21[run.CUT]["flops"], planner.cuts()
    hollowed, lora = (
        planner.step_flops(Setting(cut, 512, training=TrainSettings(rank=128))) for cut in (run.CUT, None)
    )
    of_drawing = [flops["precompute"] + flops["hollowed_forward"], flops["full"]]
    counts = [flops["precompute"], hollowed, lora, *of_drawing]
    return {
        "gib": {
            way.name: _gib(planner, way, most_changed)
            for way in WAYS
            if (way.cut is None or way.cut in worthwhile) and (way.learning != "most changed blocks" or most_changed)
        },
        "recomputed": {way.name: _gib(planner, way, checkpointing=True) for way in (LORA, HOLLOWED)},
        "inference": inference(),
        "operations": dict(zip(TABLE_3, counts, strict=True)),
        "fp32_storage": [
            [cut, samples, planner.store_bytes(Setting(cut, 512, samples=samples, store_dtype=torch.float32))]
            for cut, samples in TABLE_6
        ],
        "removed": {
            name: [row["removed_percent"] for row in table] for name, table in (("sd21", sd21), ("embedded", embedded))
        },
    }


def _gib(planner: Planner, way: Way, most_changed: Sequence[str] = (), *, checkpointing: bool = False) -> float:
    if way.method in ("lora", "hollowed"):
        targets = learned(way, planner.network, ATTENTION, most_changed)
        training = TrainSettings(rank=way.rank, targets=targets, gradient_checkpointing=checkpointing)
        setting = Setting(way.cut, 512 * way.side // world.SIZE, base_bits=way.bits, training=training)
        return planner.peak("train", setting).total / GIB
    with torch.device("meta"):
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(layout_config("sd21"))
        if way.cut is not None:
            unet = pruned(unet, way.cut)
    return _peak(unet, None if way.method == "full" else way.rank) / GIB


def _peak(unet: UNet2DConditionModel, rank: int | None) -> int:
    """Bytes of a training step with AdamW of a LoRA on the attention, or of all weights."""
    if rank is not None:
        add_lora(unet, rank, generator=torch.Generator())
    parameters = list(unet.parameters()) if rank is None else lora_parameters(unet)
    latents, prompt = UNet(unet).inputs(64, 64)
    with DryRun() as dry:
        dry.hold("weights", unet)
        optimizer = torch.optim.AdamW(parameters, foreach=True)  # as PyTorch chooses by itself on CUDA
        predicted = unet(latents.to("meta"), 1, prompt.encoder_hidden_states.to("meta")).sample
        predicted.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return dry.peak().total
