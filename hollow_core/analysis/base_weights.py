"""A base model's weights one by one, off the disk when they are asked for: no model is ever loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from ..errors import HollowError
from ..models.parts import weight_files
from ..models.stored import StoredWeights
from ..nets.families import family_in
from ..nets.unet_layers import Config, to_ldm

BaseWeights: TypeAlias = Callable[[str], Tensor]
"""From a diffusers module's name ("mid_block.attentions.0.proj_in") to its weight."""


def base_weights(path: Path, config: Config) -> BaseWeights:
    """The weights of a .safetensors checkpoint or of a diffusers folder, whose network has this config.

    Raises HollowError for a folder without weights as safetensors, and for a transformer's checkpoint; the function
    does so for a damaged file and for a module that is not there.
    """
    family = family_in(config)
    if family is not None and not path.is_dir():
        raise HollowError(f"{path.name} is one file. Give the diffusers folder of {family.title}.")
    if path.is_dir():
        part = path / ("unet" if family is None else "transformer")
        files = [StoredWeights(file) for file in weight_files(part, "diffusion_pytorch_model").files]
    else:
        files = [StoredWeights(path)]

    def weight(module: str) -> Tensor:
        key = f"{module}.weight"
        if not path.is_dir():
            key = f"model.diffusion_model.{to_ldm(config, key)}"
        file = next((file for file in files if key in file), None)
        if file is None:
            raise HollowError(f"{path} has no {key}. Give the model that the LoRA was made for.")
        return file[key]

    return weight
