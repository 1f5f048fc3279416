"""The application that the commands join, and the console they speak on."""

import typer
from rich.console import Console
from rich.text import Text

app = typer.Typer(
    help="Personalise Stable Diffusion on a small GPU: five pictures in, an ordinary LoRA file out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)


def say(sentence: str) -> None:
    """On stderr, as it is and in one line."""
    console.print(Text(sentence), soft_wrap=True)
