"""`hollow demo`."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from .app import app, console
from .options import Json
from .watch import quiet, watching


class DemoModel(str, Enum):
    """As `demo.run.DEMOS` calls them."""

    unet = "unet"
    transformer = "transformer"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the LoRA, the pictures and the report.")] = Path("hollow-demo"),
    model: Annotated[
        DemoModel,
        typer.Option(
            help="Which embedded model: a U-Net, hollowed in the middle, or a transformer, hollowed at both ends."
        ),
    ] = DemoModel.unet,
    as_json: Json = False,
) -> None:
    """Personalise the embedded model offline on a subject it has never seen: minutes on two cores, no GPU."""
    quiet()
    from ..demo import run
    from ..lock import holding

    with holding(out), watching() as watch:
        report = run.run(out, progress=watch, demo=run.DEMOS[model.value])
    table = Table("", "subject score", "prompt score")
    for name, row in report["rows"].items():
        table.add_row(name, f"{row['subject_score']:.2f}", f"{row['prompt_score']:.2f}")
    console.print(table)
    console.print(Text(f"Look at {out / 'grid.png'}; the LoRA is {out / 'lora.safetensors'}."), soft_wrap=True)
    if as_json:
        print(json.dumps(report, indent=1))
