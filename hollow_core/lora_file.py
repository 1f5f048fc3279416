"""LoRA files in kohya's spelling, which every tool reads: `lora_unet_….lora_down.weight`, `lora_up`, `alpha`.

The layer's path is spelled with underscores, in diffusers' names for SD 1.x and 2.x, in those of the original
checkpoint (LDM) for SDXL. What two-path sampling needs beyond the weights lies in the metadata, `hollow.*`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from .blocks import to_ldm
from .errors import HollowError
from .files import read_safetensors, write_safetensors

# The values that kohya's trainer writes.
_BASE_VERSION = {"sd15": "sd_v1", "sd21": "sd_v2", "sdxl": "sdxl_base_v1-0"}
_ARCHITECTURE = {
    "sd15": "stable-diffusion-v1",
    "sd21": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
_SGM = "https://github.com/Stability-AI/generative-models"


class Recipe(NamedTuple):
    """How a LoRA was trained, as far as sampling on two paths needs it; stored under `hollow.*`."""

    cut: int | None
    """The paper's k; None for an ordinary LoRA on the whole U-Net."""
    identifier: str
    class_word: str
    personal_prompt: str
    generic_prompt: str
    prediction_type: str = "epsilon"
    """The base model's: "epsilon" or "v_prediction"."""


class LoraFile(NamedTuple):
    """What `load` finds in a file."""

    state: dict[str, Tensor]
    """As `lora.lora_state` gives it: "….to_q.lora_A.weight" (rank, in, …) and "….lora_B.weight", fp32."""
    alpha: float
    """One for all layers: a file with several has the difference multiplied into its lora_B."""
    recipe: Recipe | None
    """None where the file was not written by Hollow."""
    metadata: dict[str, str]
    """All of it, as stored."""


def save(
    path: Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    alpha: float,
    layout: str,
    recipe: Recipe,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA (names as in `LoraFile.state`, any dtype) as fp16, and read it back to compare.

    `config` is the U-Net's; `layout` "sdxl" asks for LDM names; `metadata` comes on top of the standard one.
    Raises HollowError where the name does not end in .safetensors, where a value is not finite in fp16, and
    where the file cannot be written; then nothing is left at `path` that was not there before.
    """
    tensors = to_kohya(state, config, alpha=alpha, layout=layout)
    rank = max(len(tensor) for key, tensor in state.items() if key.endswith("lora_A.weight"))
    described = describe(path.stem, layout, rank, alpha, recipe) | dict(metadata or {})
    write(path, tensors, described)


def to_kohya(state: Mapping[str, Tensor], config: Mapping[str, Any], *, alpha: float, layout: str) -> dict[str, Tensor]:
    """What a file holds: `lora_unet_….lora_down.weight`, `.lora_up.weight` and `.alpha` of each layer, in fp16.

    Raises HollowError where a value is not finite in fp16.
    """
    tensors: dict[str, Tensor] = {}
    for module in sorted({key.rsplit(".lora_", 1)[0] for key in state}):
        name = kohya_name(to_ldm(config, module) if layout == "sdxl" else module)
        tensors[f"{name}.lora_down.weight"] = state[f"{module}.lora_A.weight"]
        tensors[f"{name}.lora_up.weight"] = state[f"{module}.lora_B.weight"]
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    tensors = {key: tensor.detach().to("cpu", torch.float16) for key, tensor in tensors.items()}
    _check_finite(tensors, "The LoRA", "Lower the learning rate and train again.")
    return tensors


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write what `to_kohya` and `describe` give, and read it back to compare. Raises HollowError as `save` does."""
    if path.suffix != ".safetensors":
        raise HollowError(f"The name {path.name!r} does not end in .safetensors. Choose one that does.")
    write_safetensors(path, tensors, metadata)
    written, _ = read_safetensors(path)
    if written.keys() != tensors.keys() or any(not torch.equal(written[key], tensors[key]) for key in tensors):
        raise HollowError(f"{path} does not read back as it was written. Check the disk and save again.")


def load(path: Path, unet: UNet2DConditionModel) -> LoraFile:
    """Read a LoRA in kohya's spelling, in diffusers' or LDM names, for this U-Net.

    Raises HollowError where the file is missing or truncated, where it is no such LoRA, where a layer is not
    the U-Net's or has other shapes (the sentence names the first such key), and where a value is not finite.
    """
    tensors, metadata = read_safetensors(path)
    names = sorted({key.partition(".")[0] for key in tensors})
    if not any(name.startswith("lora_unet_") for name in names):
        raise HollowError(f"{path} holds no LoRA in kohya's spelling. Choose a file with lora_unet_… keys.")
    _check_finite(tensors, str(path), "Take another copy of it.")
    weights = _weights(unet)
    modules = {name: module for module in weights for name in _spellings(unet.config, module)}
    state: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name in names:
        module = modules.get(name)
        if module is None:
            raise _other_model(path, name, "is no layer of this U-Net")
        down, up = (_take(path, tensors, f"{name}.lora_{side}.weight") for side in ("down", "up"))
        weight = weights[module]
        for side, found, needed in (
            ("down", down.shape, (len(down), *weight.shape[1:])),
            ("up", up.shape, (len(weight), len(down), *[1] * (weight.dim() - 2))),
        ):
            if tuple(found) != needed:
                key = f"{name}.lora_{side}.weight"
                raise _other_model(path, key, f"has shape {tuple(found)}, but this U-Net needs {needed}")
        alphas[module] = alpha_of(tensors, name, len(down))
        tensors.pop(f"{name}.alpha", None)
        state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"] = down.float(), up.float()
    if tensors:
        raise HollowError(f"{path} is no plain LoRA: it holds {min(tensors)} too. Choose one without.")
    alpha = next(iter(alphas.values()))
    for module in alphas:
        state[f"{module}.lora_B.weight"] *= alphas[module] / alpha
    return LoraFile(state, alpha, recipe_of(metadata), metadata)


def alpha_of(tensors: Mapping[str, Tensor], name: str, rank: int) -> float:
    """The alpha of a layer in kohya's spelling: missing or zero, it is the rank."""
    return float(tensors.get(f"{name}.alpha", 0.0)) or float(rank)


def kohya_name(module: str) -> str:
    """ "mid_block.attentions.0.proj_in" as kohya spells it: "lora_unet_mid_block_attentions_0_proj_in"."""
    return "lora_unet_" + module.replace(".", "_")


def _weights(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The weight of each layer that can carry LoRA, under the name it has without LoRA layers around it."""
    return {
        name.removesuffix(".base_layer"): module.weight
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name
    }


def _spellings(config: Mapping[str, Any], module: str) -> Iterator[str]:
    yield kohya_name(module)
    yield kohya_name(to_ldm(config, module))


def _take(path: Path, tensors: dict[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise HollowError(f"{path} lacks {key}, so it is no whole LoRA. Get or make it again.")
    return tensors.pop(key)


def _check_finite(tensors: Mapping[str, Tensor], what: str, next_step: str) -> None:
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise HollowError(f"{what} holds infinite or undefined values in {key}. {next_step}")


def _other_model(path: Path, key: str, why: str) -> HollowError:
    return HollowError(f"{path} was made for another kind of model: {key} {why}. Use it with its own base model.")


def describe(title: str, layout: str, rank: int, alpha: float, recipe: Recipe) -> dict[str, str]:
    """What kohya's trainer and the modelspec standard write, as far as tools read it, and our own."""
    trigger = f"{recipe.identifier} {recipe.class_word}".strip()
    velocity = recipe.prediction_type == "v_prediction"
    described = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_v2": str(layout == "sd21"),
        "ss_output_name": title,
        "ss_tag_frequency": json.dumps({recipe.class_word: {trigger: 1}}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": _SGM if layout == "sdxl" else "diffusers",
        "modelspec.title": title,
        "modelspec.trigger_phrase": trigger,
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        **{f"hollow.{field}": json.dumps(value) for field, value in recipe._asdict().items()},
    }
    if layout in _BASE_VERSION:
        described["ss_base_model_version"] = _BASE_VERSION[layout]
        architecture = "stable-diffusion-v2-768-v" if layout == "sd21" and velocity else _ARCHITECTURE[layout]
        described["modelspec.architecture"] = f"{architecture}/lora"
    return described


def layout_of(metadata: Mapping[str, str]) -> str:
    """ "sd15", "sd21" or "sdxl", as the metadata of a file tell. Raises HollowError where they do not."""
    version = metadata.get("ss_base_model_version", "")
    layout = next((name for name, written in _BASE_VERSION.items() if version.startswith(written)), None)
    if layout is None:
        raise HollowError(f"The LoRA's base model is {version or 'not named'}. Connect the model that it belongs to.")
    return layout


def recipe_of(metadata: Mapping[str, str]) -> Recipe | None:
    """The recipe that `describe` wrote; None in another tool's file."""
    try:
        return Recipe(**{field: json.loads(metadata[f"hollow.{field}"]) for field in Recipe._fields})
    except (KeyError, ValueError):
        return None
