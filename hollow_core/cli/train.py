"""`hollow train`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from ..errors import HollowError
from .app import app, console
from .options import (
    BaseBitsOption,
    CheckpointLevels,
    Dora,
    FusedBackward,
    Json,
    LoraPrecision,
    LoraPrecisionOption,
    LRSchedule,
    ModelPath,
    Optimizer,
    OptimizerKind,
    Precision,
    PredictionType,
    Strategy,
    Stream,
    StreamMiddle,
    TiledVae,
    Together,
    device_of,
    load_model,
    setting_of,
)
from .watch import quiet, stopping, watching


@app.command()
def train(
    model: ModelPath,
    images: Annotated[Path, typer.Option(help="Folder with four or five pictures of the subject; NAME.txt beside NAME.png is its caption.")],
    subject: Annotated[str, typer.Option(help="What the subject is, in a common word: dog, cup, backpack.")],
    out: Annotated[Path, typer.Option(help="Folder for lora.safetensors, and for the work that lets a stopped run go on.")] = Path("hollow-lora"),
    identifier: Annotated[str, typer.Option(help="The rare word that will call the subject in prompts.")] = "sks",
    cut: Annotated[int, typer.Option(help="How much of the U-Net to hollow, see `hollow cuts`; -1 for an ordinary LoRA on all of it.")] = 3,
    resolution: Annotated[int | None, typer.Option(help="Side of the square pictures in pixels. (default: the model's own)")] = None,
    samples: Annotated[int, typer.Option(help="Records to precompute; half are of the class where there are class images.")] = 200,
    class_images: Annotated[int, typer.Option(help="Pictures of the class that the base model draws for prior preservation; 0 does without.")] = 0,
    prior_weight: Annotated[float, typer.Option(help="Weight of the prior-preservation loss.")] = 1.0,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="Alpha of the LoRA. (default: the rank)")] = None,
    dora: Dora = False,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    learning_rate: Annotated[float | None, typer.Option(help="The learning rate at its highest. (default: the optimizer's usual one, 1e-4 of adamw)")] = None,
    lr_schedule: Annotated[LRSchedule, typer.Option(help="How the learning rate goes along the steps.")] = LRSchedule.constant,
    warmup: Annotated[int, typer.Option(help="Steps over which the learning rate rises from 0 first.")] = 0,
    ema: Annotated[float | None, typer.Option(help="Decay of an average over the steps that is given out in the LoRA's place, such as 0.99. (default: off)")] = None,
    optimizer: Optimizer = OptimizerKind.adamw,
    max_grad_norm: Annotated[float, typer.Option(help="The gradient is scaled down to this norm if it is longer; inf never clips.")] = 1.0,
    fused_backward: FusedBackward = False,
    batch: Annotated[int, typer.Option(help="Records a step; costs time, and memory only for what is --together.")] = 1,
    together: Together = 1,
    snr_gamma: Annotated[float | None, typer.Option(help="Gamma of min-SNR weighting, usually 5. (default: off)")] = None,
    precision: Annotated[Precision, typer.Option(help="Of the base model and the arithmetic.")] = Precision.fp32,
    lora_precision: LoraPrecisionOption = LoraPrecision.fp32,
    base_bits: BaseBitsOption = None,
    stream: Stream = False,
    stream_middle: StreamMiddle = False,
    tiled_vae: TiledVae = False,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations: less memory, a third more time.")] = False,
    checkpoint_levels: CheckpointLevels = None,
    strategy: Annotated[Strategy, typer.Option(help="bp: backpropagation. zo: MeZO, forward passes only, at an inference's memory, slow to learn. selective: bp on small pictures, by and by zo on large ones.")] = Strategy.bp,
    low_resolution: Annotated[int | None, typer.Option(help="selective: side of the small pictures in pixels. (default: half the resolution)")] = None,
    gamma: Annotated[float, typer.Option(help="selective: how soon zo takes over; bp has the probability (1 - t/T)^(gamma s) at time step t and progress s.")] = 1.0,
    zo_learning_rate: Annotated[float | None, typer.Option(help="The optimizer's at zo steps. (default: the learning rate)")] = None,
    zo_epsilon: Annotated[float, typer.Option(help="How far a zo step moves the LoRA to look at the loss.")] = 1e-3,
    zo_queries: Annotated[int, typer.Option(help="Directions a zo step looks in, two forward passes each.")] = 2,
    zo_timesteps: Annotated[tuple[int, int] | None, typer.Option(help="zo steps draw from these time steps only, such as 500 900. (default: all)")] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints from which a killed run goes on; 0 for none.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed gives the same LoRA on the same CPU, and on a GPU the same but for rounding.")] = 0,
    thumbnail: Annotated[bool, typer.Option(help="Put the first picture, small, into the LoRA file, for tools that list files; whoever gets the file sees it.")] = False,
    prediction_type: PredictionType = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu. (default: the GPU if there is one)")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Train a LoRA of a subject on a hollowed U-Net. Press Ctrl-C to stop; the same command goes on."""
    quiet()
    import torch

    from ..data.images import load_images
    from ..data.prompts import personal_prompt
    from ..memory.meter import free_bytes
    from ..memory.planner import Planner
    from ..memory.remedy import check_fits
    from ..request import Request
    from ..road import personalize
    from ..training.selective import count_by_time

    personal_prompt(identifier, subject)  # refuse bad words before anything is loaded
    setting = setting_of(
        cut=cut,
        resolution=resolution,
        samples=samples,
        class_images=class_images,
        base_bits=base_bits,
        stream=stream,
        stream_middle=stream_middle,
        tiled_vae=tiled_vae,
        low_resolution=low_resolution,
        rank=rank,
        alpha=alpha,
        dora=dora,
        steps=steps,
        learning_rate=learning_rate,
        lr_schedule=lr_schedule.value,
        warmup=warmup,
        ema=ema,
        optimizer=optimizer,
        max_grad_norm=max_grad_norm,
        fused_backward=fused_backward,
        batch=batch,
        together=together,
        prior_weight=prior_weight,
        snr_gamma=snr_gamma,
        precision=precision.value,
        lora_precision=lora_precision,
        checkpointing=checkpointing,
        checkpoint_levels=checkpoint_levels,
        seed=seed,
        save_every=save_every,
        strategy=strategy.value,
        selective_gamma=gamma,
        zo_learning_rate=zo_learning_rate,
        zo_epsilon=zo_epsilon,
        zo_queries=zo_queries,
        zo_timesteps=zo_timesteps,
    )
    chosen = device_of(device)
    if chosen.startswith("cuda"):  # main memory can be swapped; a GPU's is there or it is not
        planner = Planner(str(model))
        going_on = (out / "store").exists()
        check_fits(planner, setting, free_bytes(torch.device(chosen)), planner.road, going_on=going_on)
    loaded = [load_model(model, precision, prediction_type)]  # its pop hands over the only reference
    side = loaded[0].resolution if resolution is None else resolution
    request = Request(load_images(images, side, square=True), subject, identifier, setting, thumbnail=thumbnail)
    with watching() as watch, stopping() as stop:
        outcome = personalize(loaded.pop, request, out, device=chosen, progress=watch, stop=stop)
    stopped = outcome.result.stopped if outcome.result is not None else "stop"
    if as_json:
        stages = [vars(stage) for stage in outcome.meter.stages]
        steps_by_time = count_by_time(outcome.result.taken) if outcome.result is not None else []
        print(
            json.dumps(
                {
                    "file": str(outcome.file) if outcome.file else None,
                    "stopped": stopped,
                    "largest_change": outcome.written.largest if outcome.written else None,
                    "stages": stages,
                    "steps_by_time": steps_by_time,
                }
            )
        )
    if stopped == "stop":
        console.print("Stopped. The same command goes on from here.")
        raise typer.Exit(130)
    if stopped != "finished":
        raise HollowError(
            f"Training met a {stopped} after {outcome.result.steps if outcome.result else 0} steps; the last good LoRA is "
            f"{outcome.file}. Lower --learning-rate, or use --precision fp32, in a new --out folder."
        )
    console.print(Text(outcome.written.sentence if outcome.written else ""), soft_wrap=True)
