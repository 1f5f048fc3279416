"""Single-file checkpoints in the original (LDM) layout: SD 1.x, SD 2.x and SDXL, without the network.

`layouts/` holds the configs of the three families, each as a diffusers folder without weights, and CLIP's
tokenizer: all that a file does not tell.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ..errors import HollowError
from ..files import damaged
from ..nets.families import TITLES
from ..nets.unet_layers import ldm_names
from . import layouts
from .parts import empty_part, load_tokenizer, quiet, unloadable
from .schedulers import told_by_file
from .stored import StoredWeights, clip_weights, filled

_UNET = "model.diffusion_model."
_FIRST = f"{_UNET}input_blocks.0.0.weight"
_TEXT = f"{_UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
_BIAS = f"{_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_CLIP = {"text_encoder": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")}
_OPEN_CLIP = {"text_encoder": "cond_stage_model.model.", "text_encoder_2": "conditioner.embedders.1.model."}

_LAYER = re.compile(r".*?_blocks?\.\d+(\.\d+)?(\.transformer_blocks\.\d+)?")
"""What a U-Net has or has not as a whole."""

_WIDTHS = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
"""Layouts by how wide the text is that they hear."""

_SDXL_BY_DEPTH = {4: "SSD-1B", 2: "Segmind-Vega"}
"""Pruned ones, by how many transformer blocks are left of the ten of the deepest layer."""


def file_part(weights: StoredWeights, config: Path, name: str, kind: Any) -> Any:
    """A part of a checkpoint, made of its `weights`, outlined or not; by the name that it has in `config`, a
    diffusers folder with the sizes of its layers. Raises HollowError where weights are missing or of other shapes."""
    module = empty_part(config, name, kind)
    if name == "unet":
        found: Mapping[str, Tensor] = _unet_weights(weights, module, config)
    elif name == "vae":
        found = _converted(weights, partial(convert_ldm_vae_checkpoint, weights, module.config))
    else:
        found = clip_weights(module, _converted(weights, partial(_text_weights, weights, module, name)))
    filled(module, found, weights.path, name)
    if weights.outlined:
        module.requires_grad_(False).to("meta")  # with what no file has, as CLIP's positions
    return module


def tokenizers(config: Path, names: Sequence[str], encoders: Sequence[nn.Module]) -> tuple[CLIPTokenizer, ...]:
    """Of the text encoders, by their names in a diffusers folder. The public layouts have CLIP's own; OpenCLIP differs
    in the padding only. Raises HollowError as `load_tokenizer` does."""
    if config.parent != layouts.FOLDER:
        pairs = zip(names, encoders, strict=True)
        return tuple(load_tokenizer(config, name, CLIPTokenizer, encoder) for name, encoder in pairs)
    clip: dict[str, str] = {}
    open_clip = {"pad_token": "!"}
    padding = {"sd15": [clip], "sd21": [open_clip], "sdxl": [clip, open_clip]}[config.name]
    return tuple(
        load_tokenizer(layouts.FOLDER, "tokenizer", CLIPTokenizer, encoder, **options)
        for options, encoder in zip(padding, encoders, strict=True)
    )


def recognise(path: Path, config: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """The folder with the configs of a .safetensors checkpoint (`config` if given), and what the file tells of
    its noise schedule. Only its header is read, and one bias. Raises HollowError for a damaged file, a LoRA, and any
    other kind of model.
    """
    try:
        with safe_open(path, "pt") as file:
            return config or layouts.FOLDER / _layout(path, file), _schedule(path, file)
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error


def sample_size(config: Path, schedule: Mapping[str, Any], usual: int) -> int:
    """The side of a file's native latents: `usual`, but SD 2.x learned v-prediction at 768 pixels."""
    velocity = schedule.get("prediction_type") == "v_prediction"
    return 96 if velocity and config == layouts.FOLDER / "sd21" else usual


def _layout(path: Path, file: Any) -> str:
    keys = set(file.keys())
    if any("lora_" in key or ".lora." in key for key in keys):
        raise HollowError(f"{path} is a LoRA, not a model. Give the base model that it belongs to.")
    text = min((key for key in keys if key.startswith(_UNET) and key.endswith("attn2.to_k.weight")), default=None)
    if _FIRST not in keys or text is None:
        raise HollowError(
            f"{path} is no checkpoint of SD 1.x, SD 2.x or SDXL. Hollow takes these only; of a transformer "
            f"({TITLES}) give the diffusers folder."
        )
    channels, width = (file.get_slice(key).get_shape()[1] for key in (_FIRST, text))
    layout = _WIDTHS.get(width)
    if channels != 4 or layout is None:
        raise HollowError(
            f"{path} takes {channels} channels and text embeddings {width} wide, so it is for inpainting, a "
            "refiner or the like. Take the plain base model."
        )
    for part, prefixes in (
        ("VAE", ("first_stage_model.",)),
        ("text encoder", ("cond_stage_", "conditioner.")),
    ):
        if not any(key.startswith(prefixes) for key in keys):
            raise HollowError(f"{path} lacks its {part}. Get the full checkpoint.")
    return layout


def _schedule(path: Path, file: Any) -> dict[str, Any]:
    """What a single file tells of its noise schedule: by `told_by_file`, or for SD 2.x by the spread of one bias, as
    ComfyUI tells the 768-pixel model (v-prediction) from the 512-pixel one (epsilon)."""
    keys = set(file.keys())
    told = told_by_file(path, keys, file.metadata() or {})
    if "prediction_type" not in told and _BIAS in keys and file.get_slice(_TEXT).get_shape()[1] == 1024:
        spread = float(file.get_tensor(_BIAS).float().std(correction=0))
        told |= {"prediction_type": "v_prediction"} if spread > 0.09 else {}
    return told


def _unet_weights(weights: StoredWeights, unet: UNet2DConditionModel, config: Path) -> dict[str, Tensor]:
    """By diffusers' names. Raises HollowError for a U-Net that has other layers than the config says."""
    names = {name: f"{_UNET}{ldm}" for name, ldm in ldm_names(unet.config, unet.state_dict()).items()}
    there = {name: ldm for name, ldm in names.items() if ldm in weights}
    lost = _layers(names.values()) - _layers(there.values())
    more = {ldm for ldm in weights if ldm.startswith(_UNET) and ldm.endswith(".weight")} - {*names.values()}
    if lost or more:
        raise _other_layers(weights, config, lost, more)
    return {name: weights[ldm] for name, ldm in there.items()}


def _layers(names: Iterable[str]) -> set[str]:
    return {match[0] for name in names if (match := _LAYER.match(name))}


def _other_layers(weights: StoredWeights, config: Path, lost: set[str], more: set[str]) -> HollowError:
    title = {"sd15": "SD 1.x", "sd21": "SD 2.x", "sdxl": "SDXL"}.get(config.name, config.name)
    how = " and ".join(
        f"{verb} {min(names).removeprefix(_UNET)}" for verb, names in (("lacks", lost), ("has", more)) if names
    )
    deepest = sum(name.startswith(f"{_UNET}input_blocks.8.1.transformer_blocks.") for name in _layers(weights))
    pruned = _SDXL_BY_DEPTH.get(deepest) if config.name == "sdxl" and lost else None
    called = f"{pruned}, whose U-Net is that" if pruned else "of a U-Net"
    return HollowError(
        f"{weights.path} is {called} of {title} with other layers: it {how}. Take {title} itself, or a model "
        "fine-tuned from it."
    )


def _text_weights(weights: StoredWeights, encoder: nn.Module, name: str) -> dict[str, Tensor]:
    """Under the names of one version of transformers or another."""
    for prefix in _CLIP.get(name, ()):
        if any(key.startswith(prefix) for key in weights):
            return {key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)}
    found: dict[str, Tensor] = convert_open_clip_checkpoint(encoder, weights, prefix=_OPEN_CLIP[name])
    return found


def _converted(weights: StoredWeights, convert: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    try:
        with quiet():
            return convert()
    except (KeyError, IndexError, ValueError, RuntimeError) as error:  # for names that are missing or of other shapes
        raise unloadable(weights.path, error) from error
