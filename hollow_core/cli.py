"""The command `hollow`: demo, cuts, plan, train, sample. Results go to stdout, everything else to stderr."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from .errors import HollowError
from .progress import Progress

if TYPE_CHECKING:
    from .residency import Bits

app = typer.Typer(
    help="Personalise Stable Diffusion on a small GPU: five pictures in, an ordinary LoRA file out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
ModelPath = Annotated[
    Path, typer.Argument(help="A .safetensors checkpoint of SD 1.x, 2.x or SDXL, or a diffusers folder.")
]


class Precision(str, Enum):
    """How weights are kept and computed with."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Strategy(str, Enum):
    """How training steps find the gradient."""

    bp = "bp"
    zo = "zo"
    selective = "selective"


class LoraPrecision(str, Enum):
    """How the LoRA is kept."""

    fp32 = "fp32"
    bf16 = "bf16"


class BaseBits(str, Enum):
    """How many bits a weight of the base may take."""

    eight = "8"
    four = "4"


class OptimizerKind(str, Enum):
    """What updates the LoRA."""

    adamw = "adamw"
    adamw8bit = "adamw8bit"


class Prediction(str, Enum):
    """What a model's U-Net predicts."""

    epsilon = "epsilon"
    v_prediction = "v_prediction"
    sample = "sample"


Optimizer = Annotated[
    OptimizerKind,
    typer.Option(help="AdamW with states in fp32, or in 8 bits by bitsandbytes: a quarter of their memory."),
]
FusedBackward = Annotated[
    bool,
    typer.Option(
        help="Update each matrix as its gradient comes, so that gradients never all exist; needs --max-grad-norm inf and no class images."
    ),
]
LoraPrecisionOption = Annotated[
    LoraPrecision,
    typer.Option(help="Of the LoRA, its gradients and AdamW's states; bf16 halves them and rounds small updates away."),
]
BaseBitsOption = Annotated[
    BaseBits | None,
    typer.Option(
        help="Quantise the base model's weights to 8 or 4 bits: a quarter or an eighth of the memory of fp32. (default: off)"
    ),
]
Stream = Annotated[
    bool,
    typer.Option(
        help="Keep the base model's weights in main memory and bring each to the GPU when it is needed: slower."
    ),
]
PredictionType = Annotated[
    Prediction | None,
    typer.Option(help="What the U-Net predicts, where the model does not tell. (default: as it tells)"),
]


def main() -> None:
    """Run the command; a HollowError is one sentence on stderr and exit status 1."""
    try:
        app()
    except HollowError as error:
        console.print(Text(f"hollow: {error}", style="red"), soft_wrap=True)
        raise SystemExit(1) from error


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the LoRA, the pictures and the report.")] = Path("hollow-demo"),
    as_json: Json = False,
) -> None:
    """Personalise the embedded model offline on a subject it has never seen: minutes on two cores, no GPU."""
    _quiet()
    from .demo import run

    with watching() as watch:
        report = run.run(out, progress=watch)
    table = Table("", "subject score", "prompt score")
    for name, row in report["rows"].items():
        table.add_row(name, f"{row['subject_score']:.2f}", f"{row['prompt_score']:.2f}")
    console.print(table)
    console.print(Text(f"Look at {out / 'grid.png'}; the LoRA is {out / 'lora.safetensors'}."), soft_wrap=True)
    if as_json:
        print(json.dumps(report, indent=1))


@app.command()
def cuts(
    model: Annotated[str, typer.Argument(help="sd15, sd21, sdxl, or a diffusers folder or .safetensors checkpoint.")],
    as_json: Json = False,
) -> None:
    """What each cut of a U-Net removes, and what it then costs to train."""
    _quiet()
    from .blocks import LAYOUTS, layout_config
    from .cost import cuts_table
    from .models import load

    rows = cuts_table(layout_config(model) if model in LAYOUTS else load(Path(model)).unet.config)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("k", "hollowed", "removed %", "parameters kept", "record", "training step")
    for row in rows:
        first, last = row["blocks"][0], row["blocks"][-1]
        table.add_row(
            str(row["k"]),
            f"{first} … {last}",
            f"{row['removed_percent']:.1f}",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['record_bytes'] / 2**20:.2f} MiB",
            f"{row['flops']['training_step'] / 1e12:.3f} TFLOP",
        )
    Console().print(table)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="sd15, sd21, sdxl, or a diffusers folder or .safetensors checkpoint.")],
    resolution: Annotated[int | None, typer.Option(help="Side of the square pictures in pixels. (default: the model's own)")] = None,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA.")] = 16,
    batch: Annotated[int, typer.Option(help="Records a step.")] = 1,
    samples: Annotated[int, typer.Option(help="Records to precompute.")] = 200,
    precision: Annotated[list[Precision] | None, typer.Option(help="Of the base model and the arithmetic; may be given several times. (default: fp32, and bf16 where a budget asks for it)")] = None,
    lora_precision: LoraPrecisionOption = LoraPrecision.fp32,
    optimizer: Optimizer = OptimizerKind.adamw,
    fused_backward: FusedBackward = False,
    base_bits: BaseBitsOption = None,
    stream: Stream = False,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations. With a budget, this, an 8-bit base and, last, streaming are tried.")] = False,
    cut: Annotated[list[int] | None, typer.Option(help="May be given several times; -1 is an ordinary LoRA on all of the U-Net. (default: all)")] = None,
    budget: Annotated[str | None, typer.Option(help="Free memory, such as 4GB: pick the least hollowing and the fastest settings that fit. (default: none, a table of all)")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """What each cut will need: memory, disk and operations, before anything is loaded and without a GPU."""
    _quiet()
    from .blocks import max_cut
    from .memory import Planner, Setting, parse_bytes
    from .train import TrainSettings

    training = TrainSettings(
        rank=rank,
        batch=batch,
        gradient_checkpointing=checkpointing,
        optimizer=optimizer.value,
        lora_precision=lora_precision.value,
        fused_backward=fused_backward,
        max_grad_norm=math.inf if fused_backward else 1.0,
    )
    setting = Setting(
        resolution=resolution, samples=samples, base_bits=_bits(base_bits), streaming=stream, training=training
    )
    precisions: list[Any] = [each.value for each in precision or []]
    if budget is not None and cut:
        raise HollowError("A budget picks the cut itself. Leave out --cut or --budget.")
    available = None if budget is None else parse_bytes(budget)
    planner = Planner(model)
    if available is None:
        cuts = cut or [-1, *range(max_cut(planner.config) + 1)]
        settings = [
            replace(setting, cut=None if k < 0 else k, training=replace(training, precision=each))
            for each in precisions or ["fp32"]
            for k in cuts
        ]
        predictions = []
        with watching() as watch:
            for number, each in enumerate(settings, start=1):
                predictions.append(planner.predict(each))
                watch("plan", Progress(number, len(settings), 0.0))
    else:
        fit = planner.fit(available, setting, **({"precisions": precisions} if precisions else {}))
        predictions = [fit.prediction]
    rows = [prediction.row() for prediction in predictions]
    if available is not None:
        rows[0]["gave_up"] = list(fit.gave_up)
        say = f"Fits into {budget}: {fit.prediction.setting}. Given up: {', '.join(fit.gave_up) or 'nothing'}."
        console.print(Text(say), soft_wrap=True)
        if (drawing := fit.prediction.stages["sample"].total) > available:
            say = f"To sample with it as `hollow sample` does takes more, {drawing / 2**30:.2f} GiB."
            console.print(Text(say), soft_wrap=True)
    if as_json:
        print(json.dumps(rows[0] if budget is not None else rows, indent=1))
        return
    stages, kinds = list(rows[0]["stages"]), list(rows[0]["stages"]["train"])[1:]
    table = Table(
        "setting",
        *stages,
        *(f"train: {kind}" for kind in kinds),
        "store",
        "TFLOP a step",
        title="peak memory in GiB, store in MiB",
    )
    for row, prediction in zip(rows, predictions, strict=True):
        training_peak = row["stages"]["train"]
        table.add_row(
            str(prediction.setting),
            *(f"{row['stages'][stage]['total'] / 2**30:.2f}" for stage in stages),
            *(f"{training_peak[kind] / 2**30:.2f}" for kind in kinds),
            f"{row['store_bytes'] / 2**20:.0f}",
            f"{row['step_flops'] / 1e12:.2f}",
        )  # fmt: skip
    Console().print(table)


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
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    learning_rate: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 1e-4,
    optimizer: Optimizer = OptimizerKind.adamw,
    max_grad_norm: Annotated[float, typer.Option(help="The gradient is scaled down to this norm if it is longer; inf never clips.")] = 1.0,
    fused_backward: FusedBackward = False,
    batch: Annotated[int, typer.Option(help="Records a step, one after the other: costs time, not memory.")] = 1,
    snr_gamma: Annotated[float | None, typer.Option(help="Gamma of min-SNR weighting, usually 5. (default: off)")] = None,
    precision: Annotated[Precision, typer.Option(help="Of the base model and the arithmetic.")] = Precision.fp32,
    lora_precision: LoraPrecisionOption = LoraPrecision.fp32,
    base_bits: BaseBitsOption = None,
    stream: Stream = False,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations: less memory, a third more time.")] = False,
    strategy: Annotated[Strategy, typer.Option(help="bp: backpropagation. zo: MeZO, forward passes only, at an inference's memory, slow to learn. selective: bp on small pictures, by and by zo on large ones.")] = Strategy.bp,
    low_resolution: Annotated[int | None, typer.Option(help="selective: side of the small pictures in pixels. (default: half the resolution)")] = None,
    gamma: Annotated[float, typer.Option(help="selective: how soon zo takes over; bp has the probability (1 - t/T)^(gamma s) at time step t and progress s.")] = 1.0,
    zo_learning_rate: Annotated[float | None, typer.Option(help="AdamW's at zo steps. (default: the learning rate)")] = None,
    zo_epsilon: Annotated[float, typer.Option(help="How far a zo step moves the LoRA to look at the loss.")] = 1e-3,
    zo_queries: Annotated[int, typer.Option(help="Directions a zo step looks in, two forward passes each.")] = 2,
    zo_timesteps: Annotated[tuple[int, int] | None, typer.Option(help="zo steps draw from these time steps only, such as 500 900. (default: all)")] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints from which a killed run goes on; 0 for none.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed gives the same LoRA on the same machine.")] = 0,
    prediction_type: PredictionType = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu. (default: the GPU if there is one)")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Train a LoRA of a subject on a hollowed U-Net. Press Ctrl-C to stop; the same command goes on."""
    _quiet()
    from .images import load_images
    from .personalize import Request, personalize
    from .prompts import personal_prompt
    from .selective import count_by_time
    from .train import TrainSettings

    personal_prompt(identifier, subject)  # refuse bad words before anything is loaded
    settings = TrainSettings(
        rank=rank,
        alpha=alpha,
        steps=steps,
        learning_rate=learning_rate,
        optimizer=optimizer.value,
        max_grad_norm=max_grad_norm,
        fused_backward=fused_backward,
        batch=batch,
        prior_weight=prior_weight,
        snr_gamma=snr_gamma,
        precision=precision.value,
        lora_precision=lora_precision.value,
        gradient_checkpointing=checkpointing,
        seed=seed,
        save_every=save_every,
        strategy=strategy.value,
        selective_gamma=gamma,
        zo_learning_rate=zo_learning_rate,
        zo_epsilon=zo_epsilon,
        zo_queries=zo_queries,
        zo_timesteps=zo_timesteps,
    )
    loaded = [_load(model, precision, prediction_type)]  # its pop hands over the only reference
    side = loaded[0].resolution if resolution is None else resolution
    request = Request(
        images=load_images(images, side),
        class_word=subject,
        identifier=identifier,
        cut=None if cut < 0 else cut,
        samples=samples,
        class_images=class_images,
        base_bits=_bits(base_bits),
        streaming=stream,
        settings=settings,
        low_resolution=low_resolution,
    )
    with watching() as watch, stopping() as stop:
        outcome = personalize(loaded.pop, request, out, device=_device(device), progress=watch, stop=stop)
    stopped = outcome.result.stopped if outcome.result is not None else "stop"
    if as_json:
        stages = [vars(stage) for stage in outcome.meter.stages]
        steps_by_time = count_by_time(outcome.result.taken) if outcome.result is not None else []
        print(
            json.dumps(
                {
                    "file": str(outcome.file) if outcome.file else None,
                    "stopped": stopped,
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
    console.print(Text(f"The LoRA is {outcome.file}."), soft_wrap=True)


@app.command()
def sample(
    model: ModelPath,
    lora: Annotated[Path, typer.Option(help="A LoRA file; one of a hollowed training is used on two paths.")],
    prompt: Annotated[list[str], typer.Option(help="What to draw, with the identifier; may be given several times.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("hollow-pictures"),
    images: Annotated[int, typer.Option(help="Pictures a prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next ones count up.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 30,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance.")] = 7.5,
    negative: Annotated[str, typer.Option(help="The negative prompt.")] = "",
    strength: Annotated[float, typer.Option(help="Of the LoRA: 0 is none, 1 as trained.")] = 1.0,
    refresh: Annotated[int, typer.Option(help="Run the base path every n-th step only: faster, and a little less exact.")] = 1,
    generic: Annotated[str | None, typer.Option(help="The prompt of the base path. (default: the prompt without the identifier)")] = None,
    single_path: Annotated[bool, typer.Option(help="Use the file as an ordinary LoRA, as other tools do.")] = False,
    width: Annotated[int | None, typer.Option(help="In pixels. (default: the model's own)")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels. (default: the model's own)")] = None,
    precision: Annotated[Precision, typer.Option(help="Of the model.")] = Precision.fp32,
    base_bits: BaseBitsOption = None,
    stream: Stream = False,
    prediction_type: PredictionType = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu. (default: the GPU if there is one)")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Draw pictures with a LoRA."""
    _quiet()
    from . import lora_file
    from .files import write_png
    from .residency import quantize
    from .residency import stream as keep_away
    from .sample import SampleSettings
    from .sample import sample as draw

    base, to = _load(model, precision, prediction_type), _device(device)
    file = lora_file.load(lora, base.unet)
    if (bits := _bits(base_bits)) is not None:
        quantize(base.unet, bits)
    if stream:
        keep_away(base.unet, to)
    size = (height or base.resolution, width or base.resolution)
    settings = SampleSettings(steps, guidance, negative, strength, refresh, size)
    prompts = [text for text in prompt for _ in range(images)]
    seeds = [seed + number for _ in prompt for number in range(images)]
    with watching() as watch:

        def progress(done: int, of: int) -> None:
            watch("sample", Progress(done, of, 0.0))

        drawn = draw(
            base,
            prompts,
            seeds,
            settings,
            lora=file,
            single_path=single_path,
            generic=generic,
            device=to,
            progress=progress,
        )
    files = []
    for number, picture in enumerate(drawn):
        files.append(out / f"{number:03}-seed{seeds[number]}.png")
        write_png(files[-1], picture)
    if as_json:
        print(json.dumps([{"file": str(file), "prompt": text, "seed": seed} for file, text, seed in zip(files, prompts, seeds, strict=True)]))  # fmt: skip
    console.print(Text(f"{len(files)} pictures are in {out}."), soft_wrap=True)


def _load(path: Path, precision: Precision, prediction_type: Prediction | None) -> Any:
    from .models import load
    from .train import DTYPES

    return load(path, DTYPES[precision.value], prediction_type=prediction_type.value if prediction_type else None)


def _bits(asked: BaseBits | None) -> "Bits | None":
    return None if asked is None else (8 if asked is BaseBits.eight else 4)


def _device(asked: str | None) -> str:
    import torch

    if asked is not None:
        return asked
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _quiet() -> None:
    """Say nothing of how libraries fetch their parts; ours are the only words on stderr."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


@contextmanager
def watching() -> Iterator[Any]:
    """Progress bars on stderr, one a stage, with loss, time left and memory in use."""
    from .meter import used_bytes

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def watch(stage: str, done: Progress) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=done.steps, note="")
            minutes, seconds = divmod(round(done.seconds_left), 60)
            note = f"{minutes}:{seconds:02} left, {used_bytes() / 2**30:.2f} GiB"
            if done.loss is not None:
                note = f"loss {done.loss:.4f}, {note}"
            bars.update(tasks[stage], completed=done.step, note=note)

        yield watch


@contextmanager
def stopping() -> Iterator[Any]:
    """Ctrl-C asks for a stop at the next step; a second one interrupts at once."""
    import signal

    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
