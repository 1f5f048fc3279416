"""`hollow evaluate`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import HollowError
from .app import app, console
from .options import ClipModel, Device, DinoModel, Json, device_of
from .watch import quiet


@app.command()
def evaluate(
    references: Annotated[Path, typer.Option(help="Folder with real pictures of the subject.")],
    generated: Annotated[Path, typer.Option(help="Folder with the pictures to score.")],
    prompts: Annotated[Path | None, typer.Option(help="Their prompts: a text with one a line, or JSON by the files' names. (default: none, and no CLIP-T)")] = None,
    identifier: Annotated[str, typer.Option(help="The rare word in the prompts, which CLIP does not know: it is left out.")] = "sks",
    grid: Annotated[Path | None, typer.Option(help="A .png to write with all pictures and their scores. (default: none)")] = None,
    cache: Annotated[Path | None, typer.Option(help="A .safetensors file that keeps the references' embeddings from run to run. (default: none)")] = None,
    dino: DinoModel = None,
    clip: ClipModel = None,
    device: Device = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Score pictures as the paper does: DINO and CLIP-I for the subject, CLIP-T for the prompt."""
    quiet()
    from ..data.folders import check_outside
    from ..data.images import picture_paths
    from ..data.picture_file import open_picture
    from ..data.prompts import generic_prompt
    from ..evaluation import scores
    from ..evaluation.score_grid import score_grid
    from ..files import write_png

    if grid is not None:
        check_outside(grid.parent, references, generated)
    real, drawn = picture_paths(references), picture_paths(generated)
    for folder, paths in ((references, real), (generated, drawn)):
        if not paths:
            raise HollowError(f"{folder} holds no pictures. Give a folder with .png or .jpg files.")
    texts = None
    if prompts is not None:
        texts = [generic_prompt(prompt, identifier) for prompt in scores.read_prompts(prompts, drawn)]
    scorers = scores.load(dino or scores.DINO, clip or scores.CLIP).to(device_of(device))
    of_real = scorers.cached_features(real, cache)
    of_prompts = None if texts is None else scorers.prompt_features(texts)
    each = scores.score(of_real, scorers.features(map(open_picture, drawn)), of_prompts)
    mean, among = scores.mean(each), scores.among(of_real)
    if grid is not None:
        write_png(grid, score_grid([*map(open_picture, real)], [*map(open_picture, drawn)], each, texts, among))
        console.print(Text(f"All pictures and their scores are in {grid}."), soft_wrap=True)
    if as_json:
        rows = [{"file": str(path), **score._asdict()} for path, score in zip(drawn, each, strict=True)]
        for row, text in zip(rows, texts or [], strict=False):
            row["prompt"] = text
        print(json.dumps({"mean": mean._asdict(), "references": among and among._asdict(), "pictures": rows}, indent=1))
        return
    table = Table("", "DINO", "CLIP-I", "CLIP-T")
    for name, score in (
        (f"{len(drawn)} pictures", mean),
        (f"the {len(real)} references to one another", among),
    ):
        if score is not None:
            table.add_row(name, *("–" if value is None else f"{value:.3f}" for value in score))
    Console().print(table)
