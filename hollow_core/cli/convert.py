"""`hollow convert`."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from .app import app, console
from .options import Json, Precision, UnetOnly
from .watch import quiet


class Dialect(str, Enum):
    """How a LoRA file is spelled."""

    kohya = "kohya"
    diffusers = "diffusers"
    peft = "peft"
    comfy = "comfy"


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A LoRA or DoRA of any dialect: a .safetensors file, or peft's folder.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, overwritten if there; for peft a folder.")],
    to: Annotated[Dialect | None, typer.Option(help="(default: kohya, which A1111, Forge, ComfyUI, InvokeAI and diffusers read alike; for a transformer what ComfyUI and diffusers both read)")] = None,
    zero_pad: Annotated[bool, typer.Option(help="Write zeros for the blocks that have no LoRA, for tools that count blocks in order.")] = False,
    unet_only: UnetOnly = False,
    dtype: Annotated[Precision, typer.Option(help="Of the numbers in the file.")] = Precision.fp16,
    model: Annotated[str | None, typer.Option(help="The base model: a diffusers folder or a checkpoint. (default: the public model that the LoRA tells of)")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write a LoRA file in another tool's dialect, and read it back to see that every key is matched.

    The metadata come along, without paths of the disk where it was made. LoRA on text encoders comes along, too, but
    for peft, whose files are for one model, and with --unet-only.
    """
    quiet()
    from ..lora import file as lora_file
    from ..models.base_model import outline
    from ..training.settings import DTYPES

    config = None if model is None else outline(model).network.config
    written = lora_file.convert(
        source,
        target,
        to and to.value,
        config=config,
        unet_only=unet_only,
        zero_pad=zero_pad,
        dtype=DTYPES[dtype.value],
    )
    if as_json:
        print(json.dumps(written._asdict() | {"path": str(written.path)}))
    console.print(Text(written.sentence), soft_wrap=True)
