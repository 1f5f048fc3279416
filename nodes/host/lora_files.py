"""LoRA files between the graph and ComfyUI's loras folder."""

from pathlib import Path

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...hollow_core.errors import HollowError
from ...hollow_core.files import read_safetensors
from ...hollow_core.lora import dialects
from ...hollow_core.lora import file as lora_file
from ...hollow_core.lora.metadata import recipe_of, thumbnail
from ...hollow_core.models.layouts import layout_name
from ...hollow_core.nets.unet_layers import Config
from ..handles import HollowLora
from .files import known_lora, listed_lora, lora_path
from .pictures import to_picture
from .progress import say
from .unet import unet_config

KEPT = 10  # files along the way


def save(
    lora: HollowLora,
    name: str,
    dialect: str,
    zero_pad: bool,
    image: Tensor | None,
    model: ModelPatcher | None,
    *,
    node_id: str,
) -> tuple[Path, str]:
    """Where the LoRA was written, and what reading it back found, which the node shows. Raises HollowError as
    `write_dialect` does."""
    path, told = _write(lora, name, dialect, zero_pad, image, model)
    say(told, node_id)
    return path, told


def save_along(lora: HollowLora, name: str, step: int, model: ModelPatcher) -> None:
    """As NAME-000200.safetensors; of a name the last KEPT stay. Raises HollowError as `save` does."""
    path, _ = _write(lora, f"{name.removesuffix('.safetensors')}-{step:06}", "kohya", False, None, model)
    lora_file.keep_last(path, KEPT)


def _write(
    lora: HollowLora, name: str, dialect: str, zero_pad: bool, image: Tensor | None, model: ModelPatcher | None
) -> tuple[Path, str]:
    path = _target(name, dialect)
    metadata = lora.metadata | {"ss_output_name": path.stem, "modelspec.title": path.stem}
    if image is not None:
        metadata |= thumbnail(to_picture(image))
    config = _config(lora, model)
    if config is None:
        if dialect != "kohya" or zero_pad:
            raise HollowError("This LoRA is for none of SD1.5, SD2.1 and SDXL. Connect its model to this node.")
        lora_file.write(path, lora.state, metadata)
        told = f"{listed_lora(path)}, {path.stat().st_size / 2**20:.1f} MB.\nConnect its model to see what it changes."
    else:
        parsed = dialects.parse(lora.state, config)
        told = _in_words(lora_file.write_dialect(path, parsed, config, metadata, dialect=dialect, zero_pad=zero_pad))
    return path, told


def convert(
    source: str, name: str, dialect: str, zero_pad: bool, model: ModelPatcher | None, *, node_id: str
) -> tuple[Path, str]:
    """Where the LoRA was written, and what reading it back found, which the node shows. Raises HollowError as
    `lora.file.convert` does."""
    config = None if model is None else unet_config(model)
    path = _target(name, dialect)
    written = lora_file.convert(known_lora(source), path, dialect, config=config, zero_pad=zero_pad)
    told = _in_words(written)
    say(told, node_id)
    return path, told


def load(name: str) -> HollowLora:
    """A LoRA of Hollow's, in kohya's spelling whatever the file's. Raises HollowError for another tool's LoRA."""
    path = known_lora(name)
    state, metadata = read_safetensors(path)
    recipe = recipe_of(metadata)
    if recipe is None:
        raise HollowError(f"{path.name} was not trained by Hollow. Use it with ComfyUI's own LoRA loader.")
    if not all(key.startswith("lora_unet_") for key in state):
        config = lora_file.config_of(metadata, {key: tensor.shape for key, tensor in state.items()})
        lora, _ = lora_file.read(path, config)
        state = dialects.spell(lora.layers, {}, config, "kohya", ldm=layout_name(config) == "sdxl")
    return HollowLora(state, recipe, metadata)


def _in_words(written: lora_file.Written) -> str:
    """What reading it back found: a node has two short lines for it."""
    text = f" and {written.text_layers} of text encoders" if written.text_layers else ""
    effect = f"largest |ΔW| {written.largest:.2g}" if written.largest else "all zero, so it has NO effect"
    if written.dora:
        effect = f"DoRA, largest |ΔW| before its magnitudes {written.largest:.2g}"
    return f"{listed_lora(written.path)}, read back:\n{written.layers} layers{text}, {effect}."


def _target(name: str, dialect: str) -> Path:
    """A file, or for peft a folder."""
    return lora_path(name).with_suffix("") if dialect == "peft" else lora_path(name)


def _config(lora: HollowLora, model: ModelPatcher | None) -> Config | None:
    """The U-Net's; None where neither a model nor the LoRA tells."""
    if model is not None:
        return unet_config(model)
    try:
        return lora_file.config_of(lora.metadata)
    except HollowError:
        return None
