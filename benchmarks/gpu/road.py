"""The whole road, pictures in and a picture out, as `benchmarks.road` goes it."""

import torch

from benchmarks import road
from hollow_core.memory.setting import Setting
from hollow_core.models.base_model import BaseModel
from hollow_core.training.settings import DTYPES

from .measurement import Figures
from .memory import free
from .models import Shape


def measure_road(shape: Shape, setting: Setting, device: torch.device) -> Figures:
    """The peak of each stage, and the median of a training step."""

    def make() -> BaseModel:
        model = road.random_model(shape.outline(DTYPES[setting.training.precision]), device)
        free(device)
        return model

    found = road.measured(make, setting, device)
    step = found.pop("step")
    peaks = {f"{stage}, GiB": gib if device.type == "cuda" else None for stage, gib in found.items()}
    return peaks | {"step, ms": 1000 * step}
