"""`hollow scale`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from .app import app, console
from .options import Json, Precision, UnetOnly
from .watch import quiet


@app.command()
def scale(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A LoRA of any dialect: a .safetensors file, or peft's folder.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write in the same dialect, overwritten if there.")],
    block: Annotated[list[str], typer.Option(help="IN08=0.5, 3-2=0 or up_blocks.3=2, several with commas or given several times; or a string of block weights, 1,0,0.5,…")],
    unet_only: UnetOnly = False,
    dtype: Annotated[Precision, typer.Option(help="Of the numbers in the file.")] = Precision.fp16,
    model: Annotated[str | None, typer.Option(help="The base model: a diffusers folder or a checkpoint. (default: the public model that the LoRA tells of)")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Multiply what a LoRA changes, block by block, and save it."""
    quiet()
    from ..analysis.block_weights import scale_file
    from ..models.base_model import outline
    from ..training.settings import DTYPES

    config = None if model is None else outline(model).network.config
    written = scale_file(source, target, ",".join(block), config=config, unet_only=unet_only, dtype=DTYPES[dtype.value])
    if as_json:
        print(json.dumps(written._asdict() | {"path": str(written.path)}))
    console.print(Text(written.sentence), soft_wrap=True)
