"""The command `hollow`, a file for each of its verbs. Results go to stdout, everything else to stderr."""

from rich.text import Text

from ..errors import HollowError
from . import analyze, benchmark, compare, convert, demo, evaluate, plan, sample, scale, train
from .app import app, console
from .encoding import spell_out_signs

__all__ = [
    "analyze",
    "benchmark",
    "compare",
    "convert",
    "demo",
    "evaluate",
    "main",
    "plan",
    "sample",
    "scale",
    "train",
]


def main() -> None:
    """Run the command; a HollowError is one sentence on stderr and exit status 1."""
    spell_out_signs()
    try:
        app()
    except HollowError as error:
        console.print(Text(f"hollow: {error}", style="red"), soft_wrap=True)
        raise SystemExit(1) from error
