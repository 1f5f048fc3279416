"""What a thread beside the main one does, so that disk and device wait less for each other."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def one_ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[tuple[Item, Made]]:
    """Each item with what `make` makes of it, made while the one before it is in use. What it raises comes out where
    the item would."""
    with ThreadPoolExecutor(1) as thread:
        waiting: list[tuple[Item, Future[Made]]] = []
        for item in items:
            waiting.append((item, thread.submit(make, item)))
            if len(waiting) == 2:
                first, made = waiting.pop(0)
                yield first, made.result()
        for last, made in waiting:
            yield last, made.result()


@contextmanager
def one_behind() -> Iterator[Callable[..., None]]:
    """Gives what does a call later, in the background: the next waits for it, as does the end, and raises what it
    raised; but what is raised inside the `with` goes first."""
    with ThreadPoolExecutor(1) as thread:
        under_way: Future[Any] | None = None

        def later(do: Callable[..., Any], *arguments: Any) -> None:
            nonlocal under_way
            if under_way is not None:
                under_way.result()
            under_way = thread.submit(do, *arguments)

        yield later
        if under_way is not None:
            under_way.result()
