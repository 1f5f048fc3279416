"""`hollow analyze`."""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import HollowError
from ..progress import Progress
from .app import app, console
from .options import Json, Precision, UnetOnly, device_of, load_model
from .watch import quiet, watching

if TYPE_CHECKING:
    from ..sampling.sample import SampleSettings


@app.command()
def analyze(
    files: Annotated[list[Path], typer.Argument(help="LoRA files of any dialect: one, two to compare, or many for mean and spread.")],
    model: Annotated[Path | None, typer.Option(help="Their base model, a .safetensors checkpoint or a diffusers folder: adds the change in relation to its weights.")] = None,
    out: Annotated[Path | None, typer.Option(help="Draw the blocks and the bars into this .png.")] = None,
    share: Annotated[float, typer.Option(help="How much of the change a recommended cut may leave out, from 0 to 1.")] = 0.1,
    ablate: Annotated[Path | None, typer.Option(help="Draw --prompt with each block switched off in turn into this .png; needs --model and one file.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Of --ablate, with the identifier.")] = None,
    unet_only: UnetOnly = False,
    seed: Annotated[int, typer.Option(help="Of --ablate.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps of --ablate.")] = 30,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance of --ablate.")] = 7.5,
    precision: Annotated[Precision, typer.Option(help="Of the model in --ablate.")] = Precision.fp32,
    device: Annotated[str | None, typer.Option(help="Of --ablate: cuda, mps or cpu. (default: the GPU if there is one)")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """What is in a LoRA, block by block: how much changes, at which rank, what looks wrong, what could be hollowed."""
    quiet()
    from ..analysis.figures import figures
    from ..analysis.picture import picture
    from ..analysis.report import analyze_files
    from ..files import write_png
    from ..sampling.sample import SampleSettings
    from ..seeds import check_seed

    settings = SampleSettings(steps, guidance)
    check_seed(seed)
    for path in (out, ablate):
        if path is not None and path.suffix.lower() != ".png":
            raise HollowError(f"The name {path.name!r} does not end in .png. Choose one that does.")
    if ablate is not None and (model is None or prompt is None or len(files) != 1):
        raise HollowError("To ablate takes one file, its --model and a --prompt. Give all of them.")
    with watching() as watch:
        analyses = analyze_files(
            files, model, lambda done, of: watch("analyze", Progress(done, of, 0.0)), unet_only=unet_only
        )
    for analysis in analyses:
        if analysis.besides:
            _say(f"{analysis.name}: {analysis.besides}", "yellow")
    console.print("Which cut, and what it would save, by a dry run …")
    result = figures(analyses, share, None if model is None else str(model))
    if out is not None:
        write_png(out, picture(analyses, share))
        result["chart"] = str(out)
    if ablate is not None and model is not None and prompt is not None:
        result["influence"] = _ablate(files[0], model, prompt, unet_only, seed, settings, precision, device, ablate)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    Console().print(_table(result))
    names = [row["name"] for row in result["loras"]]
    if len(names) == 2:
        names = [f"{letter}, {name}" for letter, name in zip("AB", names, strict=True)]
    for name, row in zip(names, result["loras"], strict=True):
        _say_what_else(name, row)
    for name, suggested in zip(names if len(names) <= 2 else [f"all {len(names)}"], result["suggestions"], strict=True):
        _say(f"{name}: {_recommendation(suggested, share)}")
    if ablate is None:
        _say("The size of a change is not its influence on the picture: --ablate shows that.")
    for path in (out, ablate):
        if path is not None:
            _say(f"Look at {path}.")


def _ablate(
    file: Path,
    model: Path,
    prompt: str,
    unet_only: bool,
    seed: int,
    settings: "SampleSettings",
    precision: Precision,
    device: str | None,
    out: Path,
) -> dict[str, float]:
    """Draws, and gives the difference that each block makes."""
    from ..analysis.ablation import ablate, grid
    from ..files import write_png
    from ..lora import file as lora_file

    base = load_model(model, precision, None)
    lora = lora_file.load(file, base.network.module, unet_only=unet_only)
    with watching() as watch:
        done = ablate(
            base,
            lora,
            prompt,
            seed,
            settings,
            device=device_of(device),
            progress=lambda number, of: watch("ablate", Progress(number, of, 0.0)),
        )
    write_png(out, grid(done, prompt))
    return {block.name: done.influence(picture) for block, picture in done.without.items()}


def _table(result: dict[str, Any]) -> Table:
    """A row a block: of one file everything, of two the change of each, of more mean and deviation."""
    rows = result["loras"]
    slots = ["slot"] if any(block["slot"] for block in rows[0]["blocks"]) else []
    table = Table("block", *slots, "module", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    influence, relative = result.get("influence"), rows[0]["whole"]["relative"] is not None
    if len(rows) > 2:
        figures = [f"mean |ΔW| of {len(rows)}", "deviation"]
    elif len(rows) == 2:
        figures = [f"mean |ΔW| of {letter}" for letter in "AB"]
    else:
        figures = ["mean |ΔW|", "share", "rank"]
        figures += [*(["‖ΔW‖/‖W‖"] if relative else []), *(["influence"] if influence else [])]
    for figure in figures:
        table.add_column(figure, justify="right")
    for same in zip(*(row["blocks"] for row in rows), strict=True):
        block = same[0]
        name = block["block"]
        if len(rows) > 2:
            found = result["spread"][name]
            cells = [f"{found['mean']:.2e}", f"{found['deviation']:.1e}"] if found else ["", ""]
        elif len(rows) == 2:
            cells = [_change(each) for each in same]
        else:
            cells = [_change(block), _percent(block["share"] or None), str(block["effective_rank"] or "")]
            cells += [_percent(block["relative"])] if relative else []
            cells += [_percent(influence.get(name))] if influence else []
        table.add_row(name, *[block[slot] for slot in slots], block["module"], *cells)
    return table


def _percent(figure: float | None) -> str:
    return "" if figure is None else f"{100 * figure:.2g} %"


def _change(block: dict[str, Any]) -> str:
    if block["mean"] is None:
        return "hollowed" if block["hollowed"] else "no LoRA"
    return f"{block['mean']:.2e}"


def _recommendation(suggested: dict[str, Any] | None, share: float) -> str:
    if suggested is None:
        return f"no cut, as even the least one's hollow holds more than {100 * share:g} % of the change."
    saved, cut = suggested["training_bytes"], suggested["cut"]
    said = str(cut) if isinstance(cut, int) else ",".join(map(str, cut))
    told = "hollow plan tells what it saves. "
    if saved is not None:
        whole = _size(saved["whole"])
        told = f"Training in fp32 at rank {saved['rank']} takes {_size(saved['hollowed'])} with it, {whole} without. "
    return (
        f"recommended cut {said}, whose hollow holds {100 * suggested['share']:.1f} % of the change. {told}"
        f"As block weights, to see what it would leave out: {suggested['block_weights']}"
    )


def _say_what_else(name: str, row: dict[str, Any]) -> None:
    """How few ranks would do, and what looks wrong, each kind once."""
    kept = row["kept_by_rank"]
    enough = next(rank for rank in kept if kept[rank] >= 0.95 or rank == max(kept))
    _say(f"{name}: of rank {max(kept)}, rank {enough} keeps {100 * kept[enough]:.0f} %.")
    if row["text_layers"]:
        _say(f"{name}: {row['text_layers']} layers of text encoders are not measured.")
    modules: dict[str, str] = {flag["what"]: flag["module"] for flag in reversed(row["flags"])}
    for what, number in Counter(flag["what"] for flag in row["flags"]).items():
        more = f", and {number - 1} more: each" if number > 1 else ""
        _say(f"{name}: {modules[what]}{more} {what}.", "yellow")


def _say(text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
