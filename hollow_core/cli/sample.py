"""`hollow sample`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from ..errors import HollowError
from ..progress import Progress
from .app import app, console
from .options import (
    FILES,
    LORA,
    MEMORY,
    PICTURES,
    BaseBits,
    DeviceOption,
    Json,
    ModelPath,
    Precision,
    PredictionType,
    bits_of,
    device_of,
    load_model,
)
from .watch import quiet, watching


@app.command()
def sample(
    model: ModelPath,
    lora: Annotated[Path, typer.Option(help="A LoRA file; one of a hollowed training is used on two paths.", rich_help_panel=LORA)],
    prompt: Annotated[list[str], typer.Option(help="What to draw, with the identifier; may be given several times.", rich_help_panel=PICTURES)],
    # LoRA
    strength: Annotated[float, typer.Option(help="Of the LoRA: 0 is none, 1 as trained.", rich_help_panel=LORA)] = 1.0,
    refresh: Annotated[int, typer.Option(help="Run the base path every n-th step only: faster, and a little less exact.", rich_help_panel=LORA)] = 1,
    generic: Annotated[str | None, typer.Option(help="The prompt of the base path. (default: the prompt without the identifier)", rich_help_panel=LORA)] = None,
    single_path: Annotated[bool, typer.Option(help="Use the file as an ordinary LoRA, as other tools do.", rich_help_panel=LORA)] = False,
    # pictures
    negative: Annotated[str, typer.Option(help="The negative prompt.", show_default="none", rich_help_panel=PICTURES)] = "",
    images: Annotated[int, typer.Option(help="Pictures a prompt.", rich_help_panel=PICTURES)] = 1,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next ones count up.", rich_help_panel=PICTURES)] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.", rich_help_panel=PICTURES)] = 30,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance.", rich_help_panel=PICTURES)] = 7.5,
    width: Annotated[int | None, typer.Option(help="In pixels. (default: the model's own)", rich_help_panel=PICTURES)] = None,
    height: Annotated[int | None, typer.Option(help="In pixels. (default: the model's own)", rich_help_panel=PICTURES)] = None,
    # memory
    together: Annotated[int, typer.Option(min=1, help="Pictures drawn at once: faster, for the memory of so many.", rich_help_panel=MEMORY)] = 1,
    precision: Annotated[Precision, typer.Option(help="Of the model.", rich_help_panel=MEMORY)] = Precision.fp32,
    base_bits: Annotated[BaseBits, typer.Option(help="Quantise the model's weights to 8 or 4 bits: a quarter or an eighth of the memory of fp32.", rich_help_panel=MEMORY)] = BaseBits.off,
    stream: Annotated[bool, typer.Option(help="Keep weights in main memory and bring each to the GPU when it is needed: slower.", rich_help_panel=MEMORY)] = False,
    tiled_vae: Annotated[bool, typer.Option(help="Decode pictures in overlapping tiles of half the side: less memory for large ones.", rich_help_panel=MEMORY)] = False,
    # files
    out: Annotated[Path, typer.Option(help="Folder for the pictures.", rich_help_panel=FILES)] = Path("hollow-pictures"),
    # model and device
    prediction_type: PredictionType = None,
    device: DeviceOption = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Draw pictures with a LoRA."""
    quiet()
    from ..files import write_png
    from ..lora import file as lora_file
    from ..models.base_model import keep_small
    from ..sampling.sample import SampleSettings, encode, portions

    to = device_of(device)
    base = load_model(model, precision, prediction_type)
    size = (height or base.resolution, width or base.resolution)
    settings = SampleSettings(steps, guidance, negative, strength, refresh, size, together)
    file = lora_file.load(lora, base.unet)
    keep_small(base, to, base_bits=bits_of(base_bits), streaming=stream, tiled_vae=tiled_vae)
    prompts = [text for text in prompt for _ in range(images)]
    seeds = [seed + number for _ in prompt for number in range(images)]
    files = [out / f"{number:03}-seed{each}.png" for number, each in enumerate(seeds)]
    with watching() as watch, _memory_told():
        generics = None if generic is None else [generic] * len(prompts)
        texts = encode(base, prompts, settings, lora=file, single_path=single_path, generics=generics, device=to)
        drawn = portions(
            base,
            texts,
            seeds,
            settings,
            lora=file,
            device=to,
            progress=lambda done, of: watch("sample", Progress(done, of, 0.0)),
        )
        for path, picture in zip(files, chain.from_iterable(drawn), strict=True):
            write_png(path, picture)
    if as_json:
        print(json.dumps([{"file": str(file), "prompt": text, "seed": seed} for file, text, seed in zip(files, prompts, seeds, strict=True)]))  # fmt: skip
    console.print(Text(f"{len(files)} pictures are in {out}."), soft_wrap=True)


@contextmanager
def _memory_told() -> Iterator[None]:
    """Where the GPU's memory runs out, raises HollowError with what to change."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise HollowError(
            "Memory ran out. Take --together 1, --precision bf16, --base-bits 8, --tiled-vae or --stream, whichever are "
            "not taken yet, or smaller pictures."
        ) from None
