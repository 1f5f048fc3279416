"""LoRA files in kohya's spelling, which every tool reads: `lora_unet_….lora_down.weight`, `lora_up`, `alpha`.

The layer's path is spelled with underscores, in diffusers' names for SD 1.x and 2.x, in those of the original
checkpoint (LDM) for SDXL. What two-path sampling needs beyond the weights lies in the metadata, `hollow.*`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import dialects
from .blocks import Config, layout_config, to_ldm
from .dialects import Lora, kohya_name
from .errors import HollowError
from .files import damaged, read_json, read_safetensors, write_safetensors

# The values that kohya's trainer writes.
_BASE_VERSION = {"sd15": "sd_v1", "sd21": "sd_v2", "sdxl": "sdxl_base_v1-0"}
_ARCHITECTURE = {
    "sd15": "stable-diffusion-v1",
    "sd21": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
_FAMILY = {
    "sd15": ("sd_v1", "stable-diffusion-v1"),
    "sd21": ("sd_v2", "stable-diffusion-v2"),
    "sdxl": ("sdxl", "stable-diffusion-xl"),
}
# What InvokeAI goes by, too.
_TEXT_WIDTH = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
_TEXT_IN = re.compile(r"attn2[._](processor[._])?to_[kv](_lora\.down|\.lora_down|\.lora\.down|\.lora_A)")
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


def read(path: Path, config: Config | None = None) -> tuple[Lora, dict[str, str]]:
    """The LoRA in a file of any dialect, and the file's metadata. Values may be infinite or undefined.

    `config` is the U-Net's; None takes that of the family (SD 1.x, SD 2.x, SDXL) of which the file tells. A config
    of peft's, adapter_config.json, is looked for beside the file. Raises HollowError where the file is missing or
    damaged, where it does not tell the family, and as `dialects.parse` does; what does not fit is not read at all.
    """
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no dict
            metadata = file.metadata() or {}
            config = config or layout_config(layout_of(metadata, shapes))
            adapters = _adapters(path, metadata)
            return dialects.parse_lazily(shapes, file.get_tensor, config, adapters, source=str(path)), metadata
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error


def _adapters(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """peft's configs of the parts that the file is for: diffusers' in the metadata, or peft's own file beside it."""
    beside = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and beside.exists():
        return {"unet": read_json(beside)}
    adapters: dict[str, dict[str, Any]] = {}
    for key, value in json.loads(metadata.get("lora_adapter_metadata", "{}")).items():
        part, _, name = key.rpartition(".")
        adapters.setdefault(part or "unet", {})[name] = value
    return adapters


def load(path: Path, unet: UNet2DConditionModel) -> LoraFile:
    """Read a plain LoRA in any dialect for this U-Net.

    Raises HollowError as `read` does, where the file is for a text encoder, too, or is a DoRA, and where a value is
    not finite.
    """
    lora, metadata = read(path, unet.config)
    check_plain(lora, str(path))
    alpha = next(iter(lora.layers.values())).alpha
    state: dict[str, Tensor] = {}
    for module, layer in lora.layers.items():
        state[f"{module}.lora_A.weight"] = layer.down
        state[f"{module}.lora_B.weight"] = layer.up * (layer.alpha / alpha)
    return LoraFile(state, alpha, recipe_of(metadata), metadata)


def check_plain(lora: Lora, source: str) -> None:
    """Raises HollowError unless it is plain LoRA of a U-Net, all of it, and finite."""
    for module, layer in (lora.layers | lora.text).items():
        if layer.dora_scale is not None:
            raise HollowError(f"{source} is a DoRA: it sets the magnitudes of {module}, too. Choose a plain LoRA.")
    if extra := [*lora.left_out, *lora.text]:
        raise HollowError(f"{source} is no plain LoRA of a U-Net: it holds {min(extra)} too. Choose one without.")
    check_finite(lora, source)


def check_finite(lora: Lora, source: str) -> None:
    """Raises HollowError, naming the first layer, where a value is infinite or undefined."""
    for module, layer in (lora.layers | lora.text).items():
        numbers = (layer.down, layer.up, torch.tensor(layer.alpha), layer.dora_scale)
        if not all(tensor.isfinite().all() for tensor in numbers if tensor is not None):
            raise HollowError(f"{source} holds infinite or undefined values in {module}. Take another copy of it.")


def alpha_of(tensors: Mapping[str, Tensor], name: str, rank: int) -> float:
    """The alpha of a layer in kohya's spelling: missing or zero, it is the rank."""
    return float(tensors.get(f"{name}.alpha", 0.0)) or float(rank)


def _check_finite(tensors: Mapping[str, Tensor], what: str, next_step: str) -> None:
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise HollowError(f"{what} holds infinite or undefined values in {key}. {next_step}")


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


def layout_of(metadata: Mapping[str, str], shapes: Mapping[str, Sequence[int]] | None = None) -> str:
    """ "sd15", "sd21" or "sdxl", as a file tells: by the width of the text that its cross-attention takes in, where
    the shapes of its tensors are given, else by its metadata. Raises HollowError where neither does."""
    for key, shape in (shapes or {}).items():
        if _TEXT_IN.search(key) and len(shape) > 1 and shape[1] in _TEXT_WIDTH:
            return _TEXT_WIDTH[shape[1]]
    version = metadata.get("ss_base_model_version", "")
    architecture = metadata.get("modelspec.architecture", "")
    for layout, (kohya, modelspec) in _FAMILY.items():
        if version.startswith(kohya) or architecture.startswith(modelspec):
            return layout
    raise HollowError(f"The LoRA's base model is {version or 'not named'}. Give the model that it belongs to.")


def recipe_of(metadata: Mapping[str, str]) -> Recipe | None:
    """The recipe that `describe` wrote; None in another tool's file."""
    try:
        return Recipe(**{field: json.loads(metadata[f"hollow.{field}"]) for field in Recipe._fields})
    except (KeyError, ValueError):
        return None
