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
    BaseBitsOption,
    Json,
    ModelPath,
    Precision,
    PredictionType,
    Stream,
    TiledVae,
    bits_of,
    device_of,
    load_model,
)
from .watch import quiet, watching


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
    together: Annotated[int, typer.Option(min=1, help="Pictures drawn at once: faster, for the memory of so many.")] = 1,
    precision: Annotated[Precision, typer.Option(help="Of the model.")] = Precision.fp32,
    base_bits: BaseBitsOption = None,
    stream: Stream = False,
    tiled_vae: TiledVae = False,
    prediction_type: PredictionType = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu. (default: the GPU if there is one)")] = None,
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
