"""`hollow train`."""

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..errors import HollowError
from ..progress import Progress
from . import run_file
from .app import app, console, say
from .levers import begun, chosen, options_of
from .options import (
    CLASS_PICTURES,
    FILES,
    LORA,
    MEMORY,
    PICTURES,
    PROMPTS,
    TRAINING,
    ZEROTH_ORDER,
    BaseBits,
    BaseBitsOption,
    Checkpointing,
    CheckpointLevels,
    DeviceOption,
    Dora,
    FusedBackward,
    Json,
    Layers,
    LayersOption,
    LoraPrecision,
    LoraPrecisionOption,
    LRSchedule,
    ModelPath,
    Optimizer,
    OptimizerKind,
    Patches,
    Precision,
    PredictionType,
    Strategy,
    Stream,
    StreamMiddle,
    TiledVae,
    TimestepSampling,
    Together,
    device_of,
    load_model,
    outline_of,
    setting_of,
)
from .pictures import show_sizes, show_unread, write_crops
from .plan import tables
from .tracking import check_tensorboard, tracking
from .watch import quiet, stopping, watching

if TYPE_CHECKING:
    from ..road import Outcome


@app.command()
def train(
    ctx: typer.Context,
    model: ModelPath,
    # pictures
    images: Annotated[Path, typer.Option(help="Folder with four or five pictures of the subject, or with folders as kohya's trainer has them: 10_sks dog. NAME.txt, NAME.caption or NAME.png.txt beside NAME.png is its caption, or metadata.jsonl has it; NAME-mask.png is its mask: black is not learned.", rich_help_panel=PICTURES)],
    resolution: Annotated[int | None, typer.Option(help="In pixels: pictures keep about their shape, at the size in steps of 64 pixels, and with about the area of this number squared, that cuts off least. (default: the model's own)", rich_help_panel=PICTURES)] = None,
    square: Annotated[bool, typer.Option("--square", show_default="off", help="Crop pictures to squares of the resolution.", rich_help_panel=PICTURES)] = False,
    patches: Patches = None,
    alpha_mask: Annotated[bool, typer.Option("--alpha-mask", show_default="off", help="What is transparent in a picture is not learned, where no mask lies beside it.", rich_help_panel=PICTURES)] = False,
    show_crops: Annotated[Path | None, typer.Option(help="Draw what is cut off of each picture into this .png before anything starts. (default: none)", rich_help_panel=PICTURES)] = None,
    validation: Annotated[Path | None, typer.Option(help="Folder of pictures that are not learned, as in --images: their loss tells what the others teach. (default: none)", rich_help_panel=PICTURES)] = None,
    hold_out: Annotated[int, typer.Option(min=0, help="Hold every n-th picture of --images out in the same way; n is 2 or more, 0 holds none out.", rich_help_panel=PICTURES)] = 0,
    validate_every: Annotated[int, typer.Option(help="Steps from one look at what is held out to the next; 0 looks before the first and after the last only.", rich_help_panel=PICTURES)] = 50,
    thumbnail: Annotated[bool, typer.Option(help="Put the first picture, small, into the LoRA file, for tools that list files; whoever gets the file sees it.", rich_help_panel=PICTURES)] = False,
    # captions and prompts
    subject: Annotated[str, typer.Option(help="What the subject is, in a common word: dog, cup, backpack. (default: as the folders or the captions say)", show_default=False, rich_help_panel=PROMPTS)] = "",
    identifier: Annotated[str, typer.Option(help="The rare word that will call the subject in prompts, where no folder says another. Empty for a style or a concept, whatever folders say: captions are taken as they are, and the base path of two-path sampling sees the whole prompt.", rich_help_panel=PROMPTS)] = "sks",
    caption_dropout: Annotated[float, typer.Option(help="Share of the records, from 0 to 1, that are learned without a caption.", rich_help_panel=PROMPTS)] = 0.0,
    shuffle_tags: Annotated[bool, typer.Option("--shuffle-tags", show_default="off", help="Bring the tags of a caption, the words between commas, in a new order for each record.", rich_help_panel=PROMPTS)] = False,
    keep_tags: Annotated[int, typer.Option(help="Of --shuffle-tags: so many tags, from the first on, stay where they are.", rich_help_panel=PROMPTS)] = 1,
    prompt_chunks: Annotated[int, typer.Option(min=1, help="Of a U-Net: in how many chunks of 75 tokens, one by one, prompts are read, as ComfyUI and A1111 read long ones, and kohya's max_token_length has it. What is behind them is not read.", rich_help_panel=PROMPTS)] = 1,
    # LoRA
    rank: Annotated[int, typer.Option(help="Rank of the LoRA: how much it can hold.", rich_help_panel=LORA)] = 16,
    alpha: Annotated[float | None, typer.Option(help="Alpha of the LoRA, which counts alpha / rank times. (default: the rank)", rich_help_panel=LORA)] = None,
    layers: LayersOption = Layers.attention,
    dora: Dora = False,
    lora_precision: LoraPrecisionOption = LoraPrecision.fp32,
    # training
    steps: Annotated[int, typer.Option(help="Training steps.", rich_help_panel=TRAINING)] = 1000,
    learning_rate: Annotated[float | None, typer.Option(help="The learning rate at its highest. (default: the optimizer's usual one: adamw 1e-4, adamw8bit 1e-4, prodigy 1, adafactor 1e-4, lion 3e-5, schedulefree 3e-4)", rich_help_panel=TRAINING)] = None,
    lr_schedule: Annotated[LRSchedule, typer.Option(help="How the learning rate goes along the steps.", rich_help_panel=TRAINING)] = LRSchedule.constant,
    warmup: Annotated[int, typer.Option(help="Steps over which the learning rate rises from 0 first.", rich_help_panel=TRAINING)] = 0,
    ema: Annotated[float | None, typer.Option(help="Decay of an average over the steps that is given out in the LoRA's place, such as 0.99. (default: off)", rich_help_panel=TRAINING)] = None,
    optimizer: Optimizer = OptimizerKind.adamw,
    max_grad_norm: Annotated[float, typer.Option(help="The gradient is scaled down to this norm if it is longer; inf never clips.", rich_help_panel=TRAINING)] = 1.0,
    batch: Annotated[int, typer.Option(help="Records a step; costs time, and memory only for what is --together.", rich_help_panel=TRAINING)] = 1,
    samples: Annotated[int, typer.Option(help="Records to precompute; half are of the class where there are class images.", rich_help_panel=TRAINING)] = 200,
    snr_gamma: Annotated[float | None, typer.Option(help="Gamma of min-SNR weighting, usually 5. (default: off)", rich_help_panel=TRAINING)] = None,
    timestep_sampling: Annotated[TimestepSampling | None, typer.Option(help="Of a transformer: which noise levels are learned. shifted: middling ones more, and then more of the noisy ones, as the model is sampled. logit-normal: not shifted. uniform: all alike. (default: shifted)", rich_help_panel=TRAINING)] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same LoRA on the same CPU, and on a GPU the same but for rounding.", rich_help_panel=TRAINING)] = 0,
    # class pictures
    class_folder: Annotated[Path | None, typer.Option(help="Folder of own pictures of the class for prior preservation, with captions or in folders named as 1_dog. (default: a folder reg or class in --images, if there is one)", rich_help_panel=CLASS_PICTURES)] = None,
    class_images: Annotated[int, typer.Option(min=0, help="Pictures of the class that the base model draws for prior preservation; 0 does without.", rich_help_panel=CLASS_PICTURES)] = 0,
    prior_weight: Annotated[float, typer.Option(help="Weight of the prior-preservation loss.", rich_help_panel=CLASS_PICTURES)] = 1.0,
    # memory
    budget: Annotated[str | None, typer.Option(help="Memory to stay within, such as 4GB. What of this group is not given, but for --fused-backward, is chosen: the least hollowing and the fastest that fit. (default: what is free on a GPU; on a CPU nothing is chosen)", rich_help_panel=MEMORY)] = None,
    cut: Annotated[str | None, typer.Option(help="How much to hollow, see `hollow cuts`: 3 of a U-Net; 14,14 of a transformer, blocks of the front and of the back; 50% of the parameters of either; -1 for an ordinary LoRA on all of it.", show_default="chosen to fit; on a CPU 3, or half of a transformer", rich_help_panel=MEMORY)] = None,
    precision: Annotated[Precision, typer.Option(help="Of the base model and the arithmetic.", show_default="bf16 where the GPU has it; fp32 on a CPU", rich_help_panel=MEMORY)] = Precision.fp32,
    together: Together = 1,
    checkpointing: Checkpointing = False,
    checkpoint_levels: CheckpointLevels = None,
    base_bits: BaseBitsOption = BaseBits.off,
    tiled_vae: TiledVae = False,
    stream: Stream = False,
    stream_middle: StreamMiddle = False,
    fused_backward: FusedBackward = False,
    # zeroth order
    strategy: Annotated[Strategy, typer.Option(help="bp: backpropagation. zo: MeZO, forward passes only, at an inference's memory, slow to learn. selective: bp on small pictures, by and by zo on large ones.", rich_help_panel=ZEROTH_ORDER)] = Strategy.bp,
    low_resolution: Annotated[int | None, typer.Option(help="selective: side of the small pictures in pixels. (default: half the resolution)", rich_help_panel=ZEROTH_ORDER)] = None,
    gamma: Annotated[float, typer.Option(help="selective: how soon zo takes over; bp has the probability (1 - t/T)^(gamma s) at time step t and progress s.", rich_help_panel=ZEROTH_ORDER)] = 1.0,
    zo_learning_rate: Annotated[float | None, typer.Option(help="The optimizer's at zo steps. (default: the learning rate)", rich_help_panel=ZEROTH_ORDER)] = None,
    zo_epsilon: Annotated[float, typer.Option(help="How far a zo step moves the LoRA to look at the loss.", rich_help_panel=ZEROTH_ORDER)] = 1e-3,
    zo_queries: Annotated[int, typer.Option(help="Directions a zo step looks in, two forward passes each.", rich_help_panel=ZEROTH_ORDER)] = 2,
    zo_strengths: Annotated[bool, typer.Option("--zo-strengths", help="selective: a zo step looks for one number a matrix, its strength, in place of all of its numbers.", show_default="off", rich_help_panel=ZEROTH_ORDER)] = False,
    zo_timesteps: Annotated[tuple[int, int] | None, typer.Option(help="zo steps draw from these time steps only, such as 500 900. (default: all)", rich_help_panel=ZEROTH_ORDER)] = None,
    # files
    out: Annotated[Path, typer.Option(help="Folder for NAME.safetensors, for run.toml with every option, and for the work that lets a stopped run go on. Other settings, pictures or captions than the first run's get a folder in it, such as rank-64-1f0c2a9e.", is_eager=True, callback=run_file.go_on, rich_help_panel=FILES)] = Path("hollow-lora"),
    name: Annotated[str, typer.Option(help="Of the LoRA's file, without .safetensors.", rich_help_panel=FILES)] = "lora",
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints from which a killed run goes on, and between files NAME-000100.safetensors of which the best can be chosen; 0 for none.", rich_help_panel=FILES)] = 100,
    keep: Annotated[int, typer.Option(min=0, help="How many of these files are kept, the last ones; 0 for none.", rich_help_panel=FILES)] = 10,
    config: Annotated[Path | None, typer.Option(help="A TOML file of these options, such as OUT/run.toml of a run to repeat; the command line wins. (default: none)", is_eager=True, callback=run_file.read_config, rich_help_panel=FILES)] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Folder for TensorBoard, with the losses and the learning rate by step in a folder called as the last of --out; see them by `tensorboard --logdir`. (default: none)", callback=check_tensorboard, rich_help_panel=FILES)] = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Print what is chosen and what it will need, and stop before anything is loaded.", show_default="off", rich_help_panel=FILES)] = False,
    # model and device
    prediction_type: PredictionType = None,
    device: DeviceOption = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Train a LoRA of a subject on a hollowed network. Press Ctrl-C to stop; the same command goes on."""
    quiet()
    from ..data.captions import CaptionChanges
    from ..data.folders import check_outside, load_pictures
    from ..lock import holding
    from ..memory.planner import Planner
    from ..request import Request, check_heard
    from ..road import check_cut, personalize

    planner = cache(partial(Planner, outline_of(str(model), prediction_type)))
    side = planner().resolution if resolution is None else resolution
    setting = setting_of(
        network=planner().network,
        cut=cut,
        resolution=side,
        samples=samples,
        class_images=class_images,
        base_bits=base_bits,
        stream=stream,
        stream_middle=stream_middle,
        tiled_vae=tiled_vae,
        low_resolution=low_resolution,
        timestep_sampling=timestep_sampling,
        patches=patches,
        rank=rank,
        layers=layers,
        dora=dora,
        alpha=alpha,
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
        validate_every=validate_every,
        strategy=strategy.value,
        selective_gamma=gamma,
        zo_learning_rate=zo_learning_rate,
        zo_epsilon=zo_epsilon,
        zo_queries=zo_queries,
        zo_strengths=zo_strengths,
        zo_timesteps=zo_timesteps,
    )
    to = device_of(device)
    places = [each for each in (images, class_folder, validation) if each is not None]
    check_outside(out, *places)
    if show_crops is not None:
        check_outside(show_crops.parent, *places)
    load = partial(load_pictures, resolution=side, square=square, alpha_mask=alpha_mask)
    found = load(images, class_folder=class_folder)
    learned, held_out, not_read = found.images, [], found.not_read
    if hold_out == 1:
        raise HollowError("--hold-out 1 leaves no picture to learn. Give 2 to hold every second one out, or more.")
    if hold_out:
        learned, held_out = (
            [each for n, each in enumerate(learned, 1) if n % hold_out],
            learned[hold_out - 1 :: hold_out],
        )
    if validation is not None:
        looked_at = load(validation)
        held_out, not_read = [*held_out, *looked_at.images], [*not_read, *looked_at.not_read]
    request = Request(
        learned,
        subject,
        identifier,
        setting,
        thumbnail=thumbnail,
        class_pictures=found.of_class,
        held_out=held_out,
        captions=CaptionChanges(caption_dropout, shuffle_tags, keep_tags),
        name=name,
        keep=keep,
    )
    request.check()
    show_sizes(request, found.passed_over, not_read)
    if show_crops is not None:
        write_crops(show_crops, request)

    setting, choice = chosen(ctx, planner, request.planned, out=out, device=to, budget=budget)
    if plan_only:
        prediction = planner().predict(setting)
        if as_json:
            print(json.dumps(prediction.row()))
        else:
            for table in tables([prediction]):
                Console().print(table)
        return

    planner().check(setting)
    check_cut(setting, planner().network)
    request = replace(request, setting=setting)
    run = [out.resolve().name]

    def placed(folder: Path) -> None:
        run_file.write(folder / run_file.RUN_FILE, ctx, options_of(setting), choice)
        if folder != out:
            say(
                f"{out} holds a training of other settings, pictures or captions, which stays. This one is in {folder}."
            )
            run.append(folder.name)

    with holding(out):
        # its pop hands over the only reference
        loaded = [load_model(model, setting.training.precision, prediction_type, prompt_chunks)]
        check_heard(loaded[0], request)
        show_unread(loaded[0], request)
        if not begun(out):
            run_file.write(out / run_file.RUN_FILE, ctx, options_of(setting), choice)
        with watching() as watch, tracking(log_dir) as track, stopping() as stop:

            def progress(stage: str, done: Progress) -> None:
                watch(stage, done)
                track("/".join(run), stage, done)

            outcome = personalize(loaded.pop, request, out, device=to, progress=progress, stop=stop, placed=placed)
    _tell(outcome, as_json)


def _tell(outcome: "Outcome", as_json: bool) -> None:
    """How the run ended. Raises typer's Exit where it was stopped, and HollowError where it failed."""
    from ..training.selective import count_by_time

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
    if outcome.result is not None and stopped != "finished":
        raise HollowError(
            f"Training met a {stopped} after {outcome.result.steps} steps; the last good LoRA is {outcome.file}. "
            f"{outcome.result.trouble}"
        )
    say(outcome.written.sentence if outcome.written else "")
