"""What training will need, cut by cut, against a budget: planned before anything is loaded."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor

from ...hollow_core.errors import HollowError
from ..handles import HollowedModel
from .memory import free_bytes
from .plan_table import Row, draw
from .unet import base_dtype, unet_config

if TYPE_CHECKING:
    from ...hollow_core.memory.planner import Planner
    from ...hollow_core.memory.setting import Setting
    from ...hollow_core.training.settings import Precision, TrainSettings

PIXELS = 8  # a side of a latent
SECONDS = 8  # of planning
AUTO = -1  # in place of a cut: the one that the budget allows


class Plan(NamedTuple):
    """What came of planning."""

    hollowed: HollowedModel
    """As asked, or as the budget allows."""
    rows: list[Row]
    advice: str
    picture: Image.Image


def plan(asked: HollowedModel, budget: float, resolution: int, rank: int, *, node_id: str) -> Plan:
    """What cuts need at `resolution` pixels and `rank` within `budget` GiB, where 0 stands for what is free and for
    the model's own resolution. With the cut AUTO it chooses cut and levers.

    From the cut that was asked outwards, as many as SECONDS allow are planned; the next time there are more.

    Raises HollowError for a cut or a budget that is none and where the budget leaves no choice; ComfyUI's exception on
    Cancel.
    """
    from ...hollow_core.memory.planner import GIB
    from ...hollow_core.memory.remedy import advice
    from ...hollow_core.memory.setting import Setting
    from ...hollow_core.training.settings import TrainSettings

    if not 0 <= budget < math.inf:
        raise HollowError(f"A budget of {budget} GiB cannot be. Give 0 for what is free.")
    planner = planner_of(asked.model)
    free = round(budget * GIB) or free_bytes(asked.model)
    setting = Setting(
        cut=None if asked.cut == AUTO else asked.cut,
        resolution=resolution or None,
        base_bits=asked.base_bits,
        streaming=asked.streaming,
        training=TrainSettings(rank=rank, precision=_precision(asked.model)),
    )
    kept = f"{asked.base_bits}-bit base" if asked.base_bits else setting.training.precision
    kept += ", streaming" * asked.streaming
    title = f"GiB at {resolution or planner.resolution} pixels, rank {rank}, {kept}; {free / GIB:.2f} free"
    begun, nearest = time.monotonic(), setting.cut or 0
    cuts = sorted({*planner.cuts(), nearest}, key=lambda cut: abs(cut - nearest))
    rows: list[Row] = []
    bar = comfy.utils.ProgressBar(len(cuts), node_id)
    for cut in cuts:
        rows = sorted([*rows, _row(planner, replace(setting, cut=cut), free)])
        bar.update_absolute(len(rows), len(cuts))
        if time.monotonic() - begun > SECONDS:
            break
    if setting.cut is None:
        fit = planner.fit(free, setting, precisions=[setting.training.precision], cuts=planner.cuts())
        chosen = fit.prediction.setting
        asked = HollowedModel(
            asked.model,
            chosen.cut or 0,
            chosen.base_bits,
            chosen.streaming,
            chosen.training.gradient_checkpointing,
            chosen.training.checkpoint_levels,
        )
        rows = sorted([_row(planner, chosen, free), *(row for row in rows if row.cut != chosen.cut)])
        said = f"Taken: {chosen}, {fit.prediction.bytes / GIB:.2f} GiB. Given up: {', '.join(fit.gave_up)}."
    elif (needed := next(row for row in rows if row.cut == setting.cut).needed) <= free:
        said = f"Cut {setting.cut} fits: {needed / GIB:.2f} of {free / GIB:.2f} GiB."
    else:
        said = f"Cut {setting.cut} does not fit. " + advice(planner, planner.road, setting, free)
    return Plan(asked, rows, said, draw(title, rows, asked.cut, said))


def planner_of(model: ModelPatcher) -> "Planner":
    """For the MODEL's U-Net; what was planned once is remembered."""
    return _planner(json.dumps(unet_config(model)))


def setting_of(
    hollowed: HollowedModel,
    latents: Sequence[Tensor],
    training: "TrainSettings | None" = None,
    samples: int = 200,
    low_latents: Sequence[Tensor] = (),
) -> "Setting":
    """How a stage will go for these `latents` (1, channels, height, width), the largest of which counts; likewise of
    the `low_latents` for BP-low."""
    from ...hollow_core.memory.setting import Setting
    from ...hollow_core.training.settings import TrainSettings

    size = _largest(latents)
    return Setting(
        cut=hollowed.cut,
        resolution=_side(size),
        size=size,
        low_resolution=_side(_largest(low_latents)) if low_latents else None,
        samples=samples,
        base_bits=hollowed.base_bits,
        streaming=hollowed.streaming,
        training=training or TrainSettings(precision=_precision(hollowed.model)),
    )


def _largest(latents: Sequence[Tensor]) -> tuple[int, int]:
    """Width and height in pixels of the picture with the most."""
    sizes = [(PIXELS * each.shape[-1], PIXELS * each.shape[-2]) for each in latents]
    return max(sizes, key=lambda size: (math.prod(size), size))


def _side(size: tuple[int, int]) -> int:
    """In pixels, of a square of about that area."""
    return PIXELS * round(math.prod(size) ** 0.5 / PIXELS)


@lru_cache(maxsize=4)
def _planner(config: str) -> "Planner":
    from ...hollow_core.memory.planner import Planner
    from ...hollow_core.models.base_model import outline_unet

    return Planner(partial(outline_unet, json.loads(config)))


def _precision(model: ModelPatcher) -> "Precision":
    """As large as the one in which ComfyUI computes with the MODEL."""
    return "fp32" if base_dtype(model) == torch.float32 else "bf16"


def _row(planner: "Planner", setting: "Setting", free: int) -> Row:
    setting = planner.eased(setting, free)
    precompute, train = (planner.peak(stage, setting).total for stage in ("precompute", "train"))
    return Row(setting.cut or 0, precompute, train, max(precompute, train) <= free)
