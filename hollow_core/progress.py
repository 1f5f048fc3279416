"""What a long run tells whoever watches it."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Progress(NamedTuple):
    """One more step is done."""

    step: int  # steps done, those of an earlier, interrupted run included
    steps: int  # steps in all
    seconds_left: float  # an estimate from the steps of this run
    loss: float | None = None  # of this step, where there is one
    validation: float | None = None  # the latest loss of held-out pictures, where there are any
    learning_rate: float | None = None  # of this step
    as_used: Callable[[], AbstractContextManager[None]] = nullcontext
    """While inside, what is made is as it would be given out now, where that is another than what is worked on."""


class Clock:
    """Makes Progress for a run of `steps` steps of which the first `done` were done before it began."""

    def __init__(self, done: int, steps: int) -> None:
        self._first, self._steps, self._started = done, steps, time.monotonic()

    def __call__(self, step: int, loss: float | None = None, **more: Any) -> Progress:
        """`step` steps are done now; `more` goes by the names of Progress."""
        seconds_a_step = (time.monotonic() - self._started) / (step - self._first)
        return Progress(step, self._steps, seconds_a_step * (self._steps - step), loss, **more)


Watch = Callable[[Progress], object]
Stop = Callable[[], bool]  # asked before each step; True ends the run


class Stopped(Exception):
    """A `Stop` said so in the midst of what is of no use unless it is whole."""


def unless_stopped(each: Iterable[T], stop: Stop | None) -> Iterator[T]:
    """The same, with `stop` asked before each. Raises Stopped where it says so."""
    for one in each:
        if stop is not None and stop():
            raise Stopped
        yield one
