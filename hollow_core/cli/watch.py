"""What a person sees while a command works, and how they stop it."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from ..progress import Progress
from .app import console, say


def quiet() -> None:
    """Say nothing of how libraries fetch their parts; ours are the only words on stderr."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@contextmanager
def watching() -> Iterator[Any]:
    """Progress bars on stderr, one a stage, with losses, time left and memory in use; where that is no terminal, a line
    as a stage begins and at each ten percent of it."""
    if not console.is_terminal:
        yield _lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def watch(stage: str, done: Progress) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=done.steps, note="")
            bars.update(tasks[stage], completed=done.step, note=_note(done))

        yield watch


def _lines() -> Callable[[str, Progress], None]:
    tenths: dict[str, int] = {}

    def watch(stage: str, done: Progress) -> None:
        tenth = 10 * done.step // max(done.steps, 1)
        if tenths.get(stage) != tenth:
            tenths[stage] = tenth
            say(f"{stage} {done.step}/{done.steps}, {_note(done)}")

    return watch


def _note(done: Progress) -> str:
    """The loss, where there is one, time left and memory in use."""
    from ..memory.meter import used_bytes

    minutes, seconds = divmod(round(done.seconds_left), 60)
    return ", ".join(
        [
            *([f"loss {done.loss:.4f}"] if done.loss is not None else []),
            *([f"validation {done.validation:.4f}"] if done.validation is not None else []),
            *([f"{minutes}:{seconds:02} left"] if done.seconds_left else []),
            f"{used_bytes() / 2**30:.2f} GiB",
        ]
    )


@contextmanager
def stopping() -> Iterator[Any]:
    """Ctrl-C asks for a stop at the next step; a second one interrupts at once.

    So do, once and again, what other programs send to end this one: SIGTERM, SIGHUP of a terminal that closes, and
    Windows' SIGBREAK; but not what is ignored, as SIGHUP is under nohup.
    """
    import signal

    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    numbers = [number for name in names if signal.getsignal(number := getattr(signal, name)) != signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
