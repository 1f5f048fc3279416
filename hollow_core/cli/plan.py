"""`hollow cuts` and `hollow plan`: what training will cost, before anything is loaded."""

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import HollowError
from ..progress import Progress
from .app import app, say
from .options import (
    LORA,
    MEMORY,
    PICTURES,
    TRAINING,
    BaseBits,
    BaseBitsOption,
    Checkpointing,
    CheckpointLevels,
    Dora,
    FusedBackward,
    Json,
    Layers,
    LayersOption,
    LoraPrecision,
    LoraPrecisionOption,
    Optimizer,
    OptimizerKind,
    Patches,
    Precision,
    PredictionType,
    Stream,
    StreamMiddle,
    TiledVae,
    Together,
    cut_as_option,
    cut_of,
    outline_of,
    setting_of,
)
from .watch import quiet, watching

if TYPE_CHECKING:
    from ..memory.planner import Prediction

ModelOrLayout = Annotated[
    str,
    typer.Argument(
        help="sd15, sd21, sdxl, flux, z-image, qwen-image, sd35-medium, krea2 or anima for the public sizes; or a diffusers folder or .safetensors checkpoint."
    ),
]
CUT = "3 of a U-Net; 14,14 of a transformer, blocks of the front and of the back; 50% of the parameters of either. May be given several times."


@app.command()
def cuts(
    model: ModelOrLayout,
    cut: Annotated[list[str] | None, typer.Option(help=f"{CUT} (default: all of a U-Net; of a transformer those that take about 10 to 80 % evenly from both ends)")] = None,
    prediction_type: PredictionType = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """What each cut removes, and what it then costs to train."""
    quiet()
    from ..memory.cost import cuts_table

    base = outline_of(model, prediction_type)()
    asked = [found for text in cut or [] if (found := cut_of(text, base.network)) is not None]
    rows = cuts_table(base.network, base.latent_side, base.latent_side, asked or None)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("cut", "hollowed", "removed %", "parameters kept", "record", "training step")
    for row in rows:
        table.add_row(
            str(cut_as_option(row["k"])),
            _hollowed(row),
            f"{row['removed_percent']:.1f}",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['record_bytes'] / 2**20:.2f} MiB",
            f"{row['flops']['training_step'] / 1e12:.3f} TFLOP",
        )
    kept = [{name: "×".join(map(str, shape)) for name, shape in row["stored"].items()} for row in rows]
    said = dict.fromkeys(", ".join(f"{name} {size}" for name, size in each.items() if name) for each in kept)
    table.caption = f"A record keeps {' or '.join(said)}." if any(said) else None
    Console().print(table)


def _hollowed(row: dict[str, Any]) -> str:
    """Where what a cut takes out begins and ends."""
    if isinstance(row["k"], int):
        return f"{row['blocks'][0]} … {row['blocks'][-1]}"
    front, back = row["k"]
    return ", ".join(f"{end} {number}" for end, number in (("first", front), ("last", back)) if number)


@app.command()
def plan(
    model: ModelOrLayout,
    resolution: Annotated[int | None, typer.Option(help="Side of the square pictures in pixels. (default: the model's own)", rich_help_panel=PICTURES)] = None,
    patches: Patches = None,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA.", rich_help_panel=LORA)] = 16,
    layers: LayersOption = Layers.attention,
    dora: Dora = False,
    lora_precision: LoraPrecisionOption = LoraPrecision.fp32,
    batch: Annotated[int, typer.Option(help="Records a step.", rich_help_panel=TRAINING)] = 1,
    samples: Annotated[int, typer.Option(help="Records to precompute.", rich_help_panel=TRAINING)] = 200,
    class_images: Annotated[int, typer.Option(min=0, help="Pictures of the class that the base model draws; 0 does without.", rich_help_panel=TRAINING)] = 0,
    optimizer: Optimizer = OptimizerKind.adamw,
    budget: Annotated[str | None, typer.Option(help="Free memory, such as 4GB: pick the least hollowing and the fastest settings that fit. (default: none, a table of all)", rich_help_panel=MEMORY)] = None,
    cut: Annotated[list[str] | None, typer.Option(help=f"{CUT} -1 is an ordinary LoRA on all of it. (default: all that `hollow cuts` shows and that leave enough to train)", rich_help_panel=MEMORY)] = None,
    precision: Annotated[list[Precision] | None, typer.Option(help="Of the base model and the arithmetic; may be given several times. (default: fp32, and bf16 where a budget asks for it)", rich_help_panel=MEMORY)] = None,
    together: Together = 1,
    checkpointing: Checkpointing = False,
    checkpoint_levels: CheckpointLevels = None,
    base_bits: BaseBitsOption = BaseBits.off,
    tiled_vae: TiledVae = False,
    stream: Stream = False,
    stream_middle: StreamMiddle = False,
    fused_backward: FusedBackward = False,
    prediction_type: PredictionType = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """What each cut will need: memory, disk and operations, before anything is loaded and without a GPU."""
    quiet()
    from ..memory.planner import Planner, parse_bytes

    planner = Planner(outline_of(model, prediction_type))
    setting = setting_of(
        network=planner.network,
        resolution=resolution,
        patches=patches,
        samples=samples,
        class_images=class_images,
        base_bits=base_bits,
        stream=stream,
        stream_middle=stream_middle,
        tiled_vae=tiled_vae,
        rank=rank,
        layers=layers,
        dora=dora,
        batch=batch,
        together=together,
        checkpointing=checkpointing,
        checkpoint_levels=checkpoint_levels,
        optimizer=optimizer,
        lora_precision=lora_precision,
        fused_backward=fused_backward,
        max_grad_norm=math.inf if fused_backward else 1.0,
    )
    precisions: list[Any] = [each.value for each in precision or []]
    if budget is None:
        settings = [
            replace(setting, cut=each, training=replace(setting.training, precision=precision))
            for precision in precisions or ["fp32"]
            for each in ([cut_of(text, planner.network) for text in cut] if cut else [None, *planner.cuts()])
        ]
        predictions = []
        with watching() as watch:
            for number, each in enumerate(settings, start=1):
                predictions.append(planner.predict(each))
                watch("plan", Progress(number, len(settings), 0.0))
        rows = [prediction.row() for prediction in predictions]
    elif cut:
        raise HollowError("A budget picks the cut itself. Leave out --cut or --budget.")
    else:
        available = parse_bytes(budget)
        fit = planner.fit(available, setting, **({"precisions": precisions} if precisions else {}))
        predictions = [fit.prediction]
        rows = [fit.prediction.row() | {"gave_up": list(fit.gave_up)}]
        say(f"Fits into {budget}: {fit.prediction.setting}. Given up: {', '.join(fit.gave_up) or 'nothing'}.")
        if (drawing := fit.prediction.stages["sample"].total) > available:
            say(f"To sample with it as `hollow sample` does takes more, {drawing / 2**30:.2f} GiB.")
    if as_json:
        print(json.dumps(rows if budget is None else rows[0], indent=1))
        return
    for table in tables(predictions):
        Console().print(table)


def tables(predictions: "list[Prediction]") -> list[Table]:
    """What each stage needs on the device and in main memory, and what the bytes of training are for."""
    stages = list(predictions[0].stages)
    of_stages = Table("setting", *stages, "store, MiB", "TFLOP a step", title="peak memory, GiB")
    main_memory = Table("setting", *stages, title="peak main memory, GiB: weights as they are loaded or away, records")
    kinds = list(predictions[0].stages["train"].bytes)
    of_training = Table("setting", *kinds, title="of which in training, GiB")
    for prediction in predictions:
        of_stages.add_row(
            str(prediction.setting),
            *(f"{prediction.stages[stage].total / 2**30:.2f}" for stage in stages),
            f"{prediction.store_bytes / 2**20:.0f}",
            f"{prediction.step_flops / 1e12:.2f}",
        )
        beside = (prediction.stages[stage].main_memory for stage in stages)
        main_memory.add_row(str(prediction.setting), *(f"{size / 2**30:.2f}" for size in beside))
        parts = prediction.stages["train"].bytes
        of_training.add_row(str(prediction.setting), *(f"{parts[kind] / 2**30:.2f}" for kind in kinds))
    return [of_stages, main_memory, of_training]
