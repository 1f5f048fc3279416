"""What to say where memory is not enough: what is needed, what is free, and which setting to take instead."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..errors import HollowError
from ..nets.network import cut_in_words
from .planner import GIB, Planner
from .setting import Setting


def check_fits(planner: Planner, setting: Setting, free: int, stages: Sequence[str], *, going_on: bool = False) -> None:
    """Raises HollowError where one of `stages` needs more than `free` bytes, naming what to change. If `going_on`, that
    leaves records and checkpoints as they are."""
    needed = {stage: needs(planner, [stage], setting) for stage in stages}
    hungriest = max(stages, key=needed.__getitem__)
    if needed[hungriest] > free:
        raise HollowError(
            f"The stage {hungriest} needs {_gib(needed[hungriest])} with {setting}, but {_gib(free)} are free. "
            + advice(planner, stages, setting, free, going_on=going_on)
        )


@contextmanager
def memory_told(
    planner: Callable[[], Planner], stage: str, setting: Setting, free: Callable[[], int], *, going_on: bool = True
) -> Iterator[None]:
    """Where memory runs out inside all the same, raises HollowError with what was predicted and what to change.

    `free` gives the bytes that are there for another try. If `going_on`, what is advised leaves records and
    checkpoints as they are, so that the run goes on from them; without, there are none yet.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        needed, available = needs(planner(), [stage], setting), free()
        raise HollowError(
            f"Memory ran out in the stage {stage}: {_gib(needed)} were predicted, {_gib(available)} are free now. "
            f"{advice(planner(), [stage], setting, min(needed - 1, available), going_on=going_on)} "
            "What was saved stays, and the same run goes on from there."
        ) from None


def needs(planner: Planner, stages: Sequence[str], setting: Setting) -> int:
    """The highest peak of `stages` in bytes."""
    return max(planner.peak(stage, setting).total for stage in stages)


def advice(planner: Planner, stages: Sequence[str], setting: Setting, free: int, *, going_on: bool = False) -> str:
    """Which setting to take, so that `stages` stay within `free` bytes, in a sentence.

    Where a run is to go on, its records stay: they were made at this cut, by a base of these bits, of latents that a
    tiled VAE gives otherwise.
    """
    smallest, least = setting, needs(planner, stages, setting)
    for words, smaller in _smaller(planner, stages, setting, going_on):
        eased = planner.eased(smaller, free)
        if "encode" in stages and eased.tiled_vae and not smaller.tiled_vae and not going_on:
            words, smaller = [*words, "a tiled VAE"], replace(smaller, tiled_vae=True)
        if "precompute" in stages and eased.stream_middle and not smaller.stream_middle:
            words, smaller = [*words, "a streamed middle"], replace(smaller, stream_middle=True)
        needed = needs(planner, stages, smaller)
        if needed <= free:
            return f"Take {' and '.join(words)}: then it is {_gib(needed)}."
        if needed < least:
            smallest, least = smaller, needed
    if smallest == setting:
        return "Close what else uses the memory, or take smaller pictures."
    return f"Even {smallest} needs {_gib(least)}: close what else uses the memory, or take smaller pictures."


def _smaller(
    planner: Planner, stages: Sequence[str], setting: Setting, going_on: bool
) -> Iterator[tuple[list[str], Setting]]:
    """Settings that need less, from those that cost least on, and what they take in words."""
    words: list[str] = []
    yield words, setting
    if any(setting.at_once(stage) > 1 for stage in stages):
        words = ["together 1"]
        setting = replace(setting, training=replace(setting.training, together=1))
        yield words, setting
    if "train" in stages and not setting.training.gradient_checkpointing:
        words = [*words, "gradient checkpointing"]
        setting = replace(setting, training=replace(setting.training, gradient_checkpointing=True))
        yield words, setting
    if setting.base_bits is None and not going_on:
        yield [*words, "an 8-bit base"], replace(setting, base_bits=8)
    if not setting.streaming:
        words = [*words, "streaming"]
        setting = replace(setting, streaming=True)
        yield words, setting
    # what is hollowed leaves training; precomputing runs it
    cut = planner.cuts()[-1 if "train" in stages else 0]
    if not going_on and cut != setting.cut:
        yield [*words, f"cut {cut_in_words(cut)}"], replace(setting, cut=cut)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
