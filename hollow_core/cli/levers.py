"""The levers of memory that nobody named, chosen to fit."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from .app import say
from .options import cut_as_option

if TYPE_CHECKING:
    from pathlib import Path

    from ..memory.planner import Planner
    from ..memory.setting import Setting

LEVERS = {
    "cut": "cut",
    "precision": "precision",
    "together": "together",
    "checkpointing": "gradient_checkpointing",
    "checkpoint_levels": "checkpoint_levels",
    "base_bits": "base_bits",
    "tiled_vae": "tiled_vae",
    "stream_middle": "stream_middle",
    "stream": "streaming",
}
"""Options, and what the library calls them: fields of `Setting`, or of its training, that `choose` may choose."""

SPARE = 20
"""A twentieth of what is free is not planned with: what cuDNN borrows, and what is lost between blocks, is in no
prediction."""


def begun(out: "Path") -> bool:
    """Whether a run has left work in `out`, which others there go by, too."""
    return any((out / left).exists() for left in ("store", "training.json", "checkpoint.safetensors"))


def chosen(
    ctx: typer.Context,
    planner: "Callable[[], Planner]",
    setting: "Setting",
    *,
    out: "Path",
    device: str,
    budget: str | None,
) -> tuple["Setting", str | None]:
    """The setting with all levers, and what was chosen of them in a sentence, which is told, too; None for nothing.

    Levers that are named, on the command line or in a file, stay as they are; where all are, and where a run has begun in
    `out`, on which this one goes on or beside which it is tried, raises HollowError if that does not fit. Where no
    `budget` is given, nearly all that is free on a GPU is one; on a CPU there is none, and nothing to choose.
    """
    import torch

    from ..memory.choice import choose, precisions_for
    from ..memory.meter import free_bytes
    from ..memory.planner import GIB, parse_bytes
    from ..memory.remedy import check_fits

    if going_on := begun(out):
        say(f"It goes on with {setting}.")
    at = torch.device(device)
    if budget is None and at.type != "cuda":  # main memory can be swapped; a GPU's is there or it is not
        return setting, None
    room = free_bytes(at) if budget is None else parse_bytes(budget)
    spare = room // SPARE if budget is None else 0
    named = {lever for option, lever in LEVERS.items() if is_named(ctx, option)}
    if "gradient_checkpointing" in named:
        named.add("checkpoint_levels")
    if going_on or named == set(LEVERS.values()):
        check_fits(planner(), setting, room, planner().road, going_on=going_on)
        return setting, None
    say("Looking for what fits …")
    fit = choose(planner(), room - spare, setting, named=named, precisions=precisions_for(at, setting))
    prediction = fit.prediction
    sentence = f"Chosen: {prediction.setting}. Given up: {', '.join(fit.gave_up) or 'nothing'}."
    say(sentence)
    say(
        f"It needs {prediction.bytes / GIB:.2f} GiB at most, in its stage {prediction.hungriest}; "
        f"{room / GIB:.2f} GiB {'are free' if budget is None else 'are the budget'}."
    )
    return prediction.setting, sentence


def is_named(ctx: typer.Context, option: str) -> bool:
    """Whether a person or a file gave this option, by its name in Python."""
    source = ctx.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"


def options_of(setting: "Setting") -> dict[str, Any]:
    """What gives these levers: {an option's name in Python: its value, None where it is left out}."""
    training = setting.training
    return {
        "cut": cut_as_option(setting.cut),
        "precision": training.precision,
        "together": training.together,
        "checkpointing": training.gradient_checkpointing,
        "checkpoint_levels": training.checkpoint_levels,
        "base_bits": "off" if setting.base_bits is None else str(setting.base_bits),
        "tiled_vae": setting.tiled_vae,
        "stream_middle": setting.stream_middle,
        "stream": setting.streaming,
    }
