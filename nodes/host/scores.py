"""What the scores need of ComfyUI: pictures, a device, and a place for the models."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import folder_paths

from ...hollow_core.evaluation.scores import Scorers, load
from .files import inside
from .memory import clear_device


@contextmanager
def scorers(dino: str, clip: str) -> Iterator[Scorers]:
    """DINO and CLIP, each from its folder in ComfyUI/models or the hub's cache, on the device while inside.

    Raises HollowError where one is in neither place, and for a name that leads out of both.
    """
    judge = load(_place(dino), _place(clip))
    clear_device()
    yield judge.to(comfy.model_management.get_torch_device())
    comfy.model_management.soft_empty_cache()


def _place(name: str) -> str:
    folder = inside(Path(folder_paths.models_dir), name)
    elsewhere = folder.is_dir() or Path(name).exists()  # relative to wherever ComfyUI was started
    on_the_hub = not elsewhere and re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    return name if on_the_hub else str(folder)
