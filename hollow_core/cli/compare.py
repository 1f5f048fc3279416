"""`hollow compare page` and `hollow compare summary`: two ways before people's eyes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .app import app, console
from .options import Json
from .watch import quiet

if TYPE_CHECKING:
    from ..evaluation.ab_page import Share

compare = typer.Typer(no_args_is_help=True, help="Let people compare two ways blindly, as in the paper's user study.")
app.add_typer(compare, name="compare")


@compare.command()
def page(
    a: Annotated[Path, typer.Option(help="Folder with pictures of one way; a method's folder of `hollow benchmark`, or any.")],
    b: Annotated[Path, typer.Option(help="The other way's, with the same names.")],
    references: Annotated[Path | None, typer.Option(help="Folder with real pictures of the subject. (default: as `hollow benchmark` wrote it down)")] = None,
    prompts: Annotated[Path | None, typer.Option(help="As for `hollow evaluate`, of the pictures in --a. (default: as `hollow benchmark` wrote it down)")] = None,
    identifier: Annotated[str, typer.Option(help="The rare word in the prompts, which is left out.")] = "sks",
    tasks: Annotated[int, typer.Option(help="Comparisons on the page, drawn from all pairs.")] = 25,
    seed: Annotated[int, typer.Option(help="Of the choice and the order.")] = 0,
    out: Annotated[Path, typer.Option(help="The page; its key is written beside it.")] = Path("compare.html"),
) -> None:  # fmt: skip
    """Write a page that asks people which of two pictures is better, and the key to their answers."""
    quiet()
    import torch

    from ..evaluation.ab_page import find_pairs, write_page
    from ..seeds import check_seed

    check_seed(seed)
    pairs = find_pairs(a, b, references, prompts, identifier)
    names = (a.name, b.name) if a.name != b.name else (str(a), str(b))
    key = write_page(out, pairs, names, torch.Generator().manual_seed(seed), tasks)
    console.print(Text(f"{out} is for people to answer: {min(tasks, len(pairs))} of {len(pairs)} pairs. Keep {key} from them."), soft_wrap=True)  # fmt: skip


@compare.command()
def summary(
    answers: Annotated[list[Path], typer.Argument(help="The files that people downloaded from the page.")],
    key: Annotated[list[Path], typer.Option(help="The page's key; may be given several times, where the pages differ by their seed.")],
    as_json: Json = False,
) -> None:  # fmt: skip
    """Count the answers, with 95 % confidence intervals."""
    quiet()
    from ..evaluation.ab_page import QUESTIONS, summarise

    result = summarise(key, answers)
    if as_json:
        print(json.dumps(result | {name: {whose: share._asdict() for whose, share in result[name].items()} for name in QUESTIONS}, indent=1))  # fmt: skip
        return
    table = Table("", "subject fidelity", "text fidelity", title=f"{result['people']} people, 95 % intervals")
    for whose, name in (("a", result["a"]), ("tie", "no difference"), ("b", result["b"])):
        table.add_row(name, *(_percent(result[question][whose]) for question in QUESTIONS))
    Console().print(table)


def _percent(share: "Share") -> str:
    return f"{100 * share.share:.1f} % ({100 * share.low:.1f} to {100 * share.high:.1f})"
