"""`hollow sample`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

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
    from .. import lora_file
    from ..files import write_png
    from ..memory import Setting
    from ..models import keep_small
    from ..sample import SampleSettings
    from ..sample import sample as draw

    base, to = load_model(model, precision, prediction_type), device_of(device)
    file = lora_file.load(lora, base.unet)
    keep_small(base, Setting(base_bits=bits_of(base_bits), streaming=stream, tiled_vae=tiled_vae), to)
    size = (height or base.resolution, width or base.resolution)
    settings = SampleSettings(steps, guidance, negative, strength, refresh, size, together)
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
            generics=None if generic is None else [generic] * len(prompts),
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
