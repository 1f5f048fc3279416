"""`hollow sample`."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import HollowError
from ..progress import Progress
from .app import app, say
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

if TYPE_CHECKING:
    from ..lora.file import LoraFile
    from ..models.model import Model


@app.command()
def sample(
    model: ModelPath,
    lora: Annotated[list[Path], typer.Option(help="A LoRA file; one of a hollowed training is used on two paths. Several, such as --lora my-lora-*.safetensors behind MODEL, draw the same in turn.", rich_help_panel=LORA)],
    more_loras: Annotated[list[Path] | None, typer.Argument(hidden=True, help="Those of --lora but the first, where a shell has found several.")] = None,
    *,
    prompt: Annotated[list[str], typer.Option(help="What to draw, with the identifier; may be given several times.", rich_help_panel=PICTURES)],
    # LoRA
    strength: Annotated[float, typer.Option(help="Of the LoRA: 0 is none, 1 as trained.", rich_help_panel=LORA)] = 1.0,
    refresh: Annotated[int, typer.Option(help="Run the base path every n-th step only: faster, and a little less exact.", rich_help_panel=LORA)] = 1,
    generic: Annotated[str | None, typer.Option(help="The prompt of the base path. (default: the prompt without the identifier)", rich_help_panel=LORA)] = None,
    single_path: Annotated[bool, typer.Option(help="Use the file as an ordinary LoRA, as other tools do.", rich_help_panel=LORA)] = False,
    unet_only: Annotated[bool, typer.Option(help="Leave out what the file has for text encoders, and embeddings.", show_default="off", rich_help_panel=LORA)] = False,
    # pictures
    negative: Annotated[str, typer.Option(help="The negative prompt.", show_default="none", rich_help_panel=PICTURES)] = "",
    prompt_chunks: Annotated[int, typer.Option(min=1, help="Of a U-Net: in how many chunks of 75 tokens, one by one, prompts are read, as ComfyUI and A1111 read long ones. What is behind them is not read.", rich_help_panel=PICTURES)] = 1,
    images: Annotated[int, typer.Option(min=1, help="Pictures a prompt.", rich_help_panel=PICTURES)] = 1,
    seed: Annotated[int, typer.Option(help="Of the first picture, from 0 to 2^64 - 1; the next ones count up.", rich_help_panel=PICTURES)] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.", rich_help_panel=PICTURES)] = 30,
    guidance: Annotated[float | None, typer.Option(help="Scale of classifier-free guidance, 1 for none, or what a distilled model is told of it. (default: 7.5, or the transformer's usual one)", rich_help_panel=PICTURES)] = None,
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
    as_grid: Annotated[bool, typer.Option("--grid", help="Write grid.png into the folder, too: a row a LoRA, a column a picture.", show_default="off", rich_help_panel=FILES)] = False,
    # model and device
    prediction_type: PredictionType = None,
    device: DeviceOption = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Draw pictures with a LoRA, or the same ones with each of several."""
    quiet()
    from ..data.grid import Row, grid
    from ..files import write_png
    from ..lora import file as lora_file
    from ..models.base_model import keep_small
    from ..sampling.sample import SampleSettings, encode, portions
    from ..seeds import counted_up

    settings = SampleSettings(steps, guidance, negative, strength, refresh, together=together)
    seeds = counted_up(seed, images) * len(prompt)
    named = lora_files([*lora, *(more_loras or [])])
    to = device_of(device)
    _check_one_path(model, refresh, generic)
    base = load_model(model, precision, prediction_type, prompt_chunks)
    size = (base.resolution if height is None else height, base.resolution if width is None else width)
    settings = replace(settings, size=size)
    loras = {
        name: lora_file.load(file, base.network.module, unet_only=unet_only) for name, file in named.items()
    }  # refuses before any is drawn
    _warn_of_unheard(base, prompt, list(loras.values()))
    keep_small(base, to, base_bits=bits_of(base_bits), streaming=stream, tiled_vae=tiled_vae)
    prompts = [text for text in prompt for _ in range(images)]
    titles = [f"{text}\nseed {number}" for text, number in zip(prompts, seeds, strict=True)]
    generics = None if generic is None else [generic] * len(prompts)
    written: list[dict[str, Any]] = []
    rows: list[Row] = []
    with watching() as watch, _memory_told():
        for name, each in loras.items():
            texts = encode(base, prompts, settings, lora=each, single_path=single_path, generics=generics, device=to)
            begin = f"{name}-" if len(loras) > 1 else ""
            progress = partial(_tell, watch, len(written), len(loras) * len(seeds))
            drawn = portions(base, texts, seeds, settings, lora=each, device=to, progress=progress)
            pictures = []
            for number, picture in enumerate(chain.from_iterable(drawn)):
                file = out / f"{begin}{number:03}-seed{seeds[number]}.png"
                write_png(file, picture)
                written.append(
                    {"file": str(file), "lora": str(named[name]), "prompt": prompts[number], "seed": seeds[number]}
                )
                pictures.append(picture)
            rows.append(Row(name, pictures, titles=[] if rows else titles))
    if as_grid:
        write_png(out / "grid.png", grid(rows))
    if as_json:
        print(json.dumps(written))
    files = [f"{len(written)} picture{'s' * (len(written) > 1)}", *["grid.png"] * as_grid]
    say(f"{' and '.join(files)} {'is' if files == ['1 picture'] else 'are'} in {out}.")


def _check_one_path(model: Path, refresh: int, generic: str | None) -> None:
    """Raises HollowError where a transformer is to draw on two paths."""
    from ..models.transformer_model import family_at

    family = family_at(model)
    for option in ("--refresh" if refresh != 1 else None, "--generic" if generic is not None else None):
        if family is not None and option is not None:
            raise HollowError(f"{family.title} draws on one path, which has no {option}. Leave it out.")


def _warn_of_unheard(base: "Model", prompts: Sequence[str], loras: Sequence["LoraFile"]) -> None:
    from ..models.base_model import chunks_lacking
    from ..sampling.sample import unheard

    for prompt in dict.fromkeys(text for lora in loras for text in unheard(base, prompts, lora)):
        needed = chunks_lacking(base, prompt)
        say(
            f"The text encoder does not read as far as the identifier in {prompt[:40]!r} …, so the subject may not be "
            "drawn. Move it to the front" + (f", or take --prompt-chunks {needed}." if needed else ".")
        )


def lora_files(asked: Sequence[Path]) -> dict[str, Path]:
    """The files that these names and patterns mean, as a person sorts numbered ones, by names that tell them apart.

    Raises HollowError for a pattern that means none.
    """
    files = [file for each in asked for file in _meant(each)]
    files = sorted(dict.fromkeys(files), key=lambda file: _natural(str(file)))
    stems = [file.name if file.is_dir() else file.stem for file in files]
    if len(set(stems)) == len(stems):
        return dict(zip(stems, files, strict=True))
    return {"-".join(part for part in file.with_suffix("").parts if part.strip("./\\")): file for file in files}


def _meant(asked: Path) -> list[Path]:
    """By a pattern, which a shell of Windows leaves as it is."""
    if asked.exists() or not has_magic(str(asked)):
        return [asked]
    found = [Path(file) for file in glob(str(asked))]
    if not found:
        raise HollowError(f"There is no file {asked}. Check the folder and the name.")
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """So that 9 comes before 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", name)]


def _tell(watch: Callable[[str, Progress], object], before: int, in_all: int, done: int, of: int) -> None:
    watch("sample", Progress(before + done, in_all, 0.0))


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
