"""A base model's weights one by one, off the disk when they are asked for: no model is ever loaded."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import HollowError
from ..files import damaged, read_json
from ..nets.families import family_in
from ..nets.unet_layers import Config, to_ldm

BaseWeights: TypeAlias = Callable[[str], Tensor]
"""From a diffusers module's name ("mid_block.attentions.0.proj_in") to its weight."""

_WEIGHTS = "diffusion_pytorch_model"


def base_weights(path: Path, config: Config) -> BaseWeights:
    """The weights of a .safetensors checkpoint or of a diffusers folder, whose network has this config.

    Raises HollowError for a folder without weights as safetensors, and for a transformer's checkpoint; the function
    does so for a damaged file and for a module that is not there.
    """
    family = family_in(config)
    if family is not None and not path.is_dir():
        raise HollowError(f"{path.name} is one file. Give the diffusers folder of {family.title}.")
    files = _of_folder(path / ("unet" if family is None else "transformer")) if path.is_dir() else None
    opened = cache(_open)

    def weight(module: str) -> Tensor:
        key = f"{module}.weight"
        if files is None:
            file, key = path, f"model.diffusion_model.{to_ldm(config, key)}"
        else:
            file = files(key)
        content, keys = opened(file)
        if key not in keys:
            raise HollowError(f"{file} has no {key}. Give the model that the LoRA was made for.")
        try:
            return content.get_tensor(key)
        except SafetensorError as error:
            raise damaged(file, error) from error

    return weight


def _open(file: Path) -> tuple[Any, frozenset[str]]:
    try:
        content = safe_open(file, "pt")
        return content, frozenset(content.keys())
    except (OSError, SafetensorError) as error:
        raise damaged(file, error) from error


def _of_folder(unet: Path) -> Callable[[str], Path]:
    """From a weight's name to its file: one for all, in full or half precision, or several with an index."""
    for variant in ("", ".fp16"):
        whole = unet / f"{_WEIGHTS}{variant}.safetensors"
        if whole.exists():
            return lambda _: whole
        index = unet / f"{_WEIGHTS}.safetensors.index{variant}.json"
        if index.exists():
            where = read_json(index)["weight_map"]
            return lambda key: unet / where.get(key, next(iter(where.values())))
    raise HollowError(f"{unet} has no {_WEIGHTS}.safetensors. Get the model in that format.")
