"""Hollow: personalise Stable Diffusion on a small GPU, by LoRA on a hollowed U-Net.

The names below are the front door; what stands behind one is imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.images import load_images as load_images
    from .errors import HollowError as HollowError
    from .lora.file import convert as convert
    from .lora.file import load as load_lora  # noqa: F401
    from .memory.planner import Planner as Planner
    from .memory.setting import Setting as Setting
    from .models.base_model import load as load
    from .request import Request as Request
    from .road import personalize as personalize
    from .sampling.sample import SampleSettings as SampleSettings
    from .sampling.sample import sample as sample
    from .sampling.two_path import two_path as two_path
    from .training.settings import TrainSettings as TrainSettings

__version__ = "0.1.0"

_BEHIND = {
    "HollowError": "errors.HollowError",
    "Planner": "memory.planner.Planner",
    "Request": "request.Request",
    "SampleSettings": "sampling.sample.SampleSettings",
    "Setting": "memory.setting.Setting",
    "TrainSettings": "training.settings.TrainSettings",
    "convert": "lora.file.convert",
    "load": "models.base_model.load",
    "load_images": "data.images.load_images",
    "load_lora": "lora.file.load",
    "personalize": "road.personalize",
    "sample": "sampling.sample.sample",
    "two_path": "sampling.two_path.two_path",
}

__all__ = [*_BEHIND]


def __getattr__(name: str) -> Any:
    if name not in _BEHIND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _BEHIND[name].rpartition(".")
    globals()[name] = found = getattr(import_module(f".{module}", __name__), attribute)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
