"""LoRAs of a graph, looked into and scaled."""

from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...hollow_core.analysis.base_weights import BaseWeights
from ...hollow_core.analysis.block_weights import parse_block_weights, scale
from ...hollow_core.analysis.figures import figures
from ...hollow_core.analysis.report import Analysis, analyze, analyze_file
from ...hollow_core.errors import HollowError
from ...hollow_core.lora import dialects
from ...hollow_core.lora.file import config_of
from ...hollow_core.models.layouts import layout_name
from ...hollow_core.nets.unet_layers import Config, to_ldm
from ..handles import HollowLora
from .files import matching_loras
from .unet import refuse_injections, unet_config, weight


def analyses_of(lora: HollowLora | None, model: ModelPatcher | None, files: str) -> list[Analysis]:
    """Of the LoRA on the wire, if any, and of the files that `files` names. Raises HollowError for none at all."""
    paths = matching_loras(files)
    if lora is None and not paths:
        raise HollowError("There is nothing to analyze. Connect a LoRA, or name files of the loras folder.")
    config = None if model is None else unet_config(model)
    base = None if model is None else base_weights(model)
    found = []
    if lora is not None:
        name = lora.metadata.get("ss_output_name") or "the LoRA"
        found.append(analyze(name, parsed(lora, config).layers, _config(lora, config), cut=lora.recipe.cut, base=base))
    for path in paths:
        found.append(analyze_file(path, config, base=base))
        if found[-1].config != found[0].config:
            raise HollowError(f"{path.name} is for another base model than the first LoRA. Analyze them apart.")
    return found


def all_figures(analyses: Sequence[Analysis], share: float) -> dict[str, Any]:
    """`figures` of the analyses, whose dry run is a training: nothing for ComfyUI's inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        return figures(analyses, share)


def scaled(lora: HollowLora, text: str, model: ModelPatcher | None) -> HollowLora:
    """The LoRA with its blocks multiplied as `text` says; in kohya's spelling and the dtype that it has."""
    config = _config(lora, None if model is None else unet_config(model))
    content, factors = parsed(lora, config), parse_block_weights(text, config)
    matrices = dialects.spell(
        scale(content.layers, factors),
        scale(content.text, factors),
        config,
        "kohya",
        ldm=layout_name(config) == "sdxl",
    )
    dtype = next(tensor.dtype for key, tensor in lora.state.items() if key.endswith("lora_down.weight"))
    return lora._replace(
        state={key: matrix if dialects.sets_magnitudes(key) else matrix.to(dtype) for key, matrix in matrices.items()}
    )


def parsed(lora: HollowLora, config: Config | None) -> dialects.Lora:
    """The LoRA apart from how it is spelled."""
    return dialects.parse(lora.state, _config(lora, config))


def base_weights(model: ModelPatcher) -> BaseWeights:
    """The MODEL's weights one by one, as the graph's patches leave them."""
    config = unet_config(model)
    refuse_injections(model)
    return lambda module: weight(model, f"{to_ldm(config, module)}.weight").cpu()


def _config(lora: HollowLora, config: Config | None) -> Config:
    shapes = {key: tuple(tensor.shape) for key, tensor in lora.state.items()}
    return config or config_of(lora.metadata, shapes)
