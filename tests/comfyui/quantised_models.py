"""Tiny models whose linear layers are kept quantised, as checkpoints of this year are."""

import json
from typing import Any

import comfy.supported_models
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from tiny_models import CPU, tiny_config, tiny_unet
from torch import Tensor

from hollow_core.nets.unet_layers import to_ldm

try:
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
except ImportError:  # of 2025
    QUANT_ALGOS, QuantizedTensor = {}, None

SCALED_FP8 = "scaled_fp8"  # the older spelling; newer hosts read it as their own format "float8_e4m3fn"
FORMATS = [
    SCALED_FP8,
    *(name for name in ("float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise") if name in QUANT_ALGOS),
]


def quantised_model(layout: str, name: str) -> tuple[ModelPatcher, dict[str, Tensor]]:
    """`tiny_model`, its linear layers in one of FORMATS, and the weights that it stands for, by their LDM names."""
    unet, config = tiny_unet(layout), tiny_config(layout)
    weights = {to_ldm(unet.config, key): weight for key, weight in unet.state_dict().items()}
    layers = [key.removesuffix(".weight") for key, weight in weights.items() if weight.dim() == 2]
    if name == SCALED_FP8:  # hosts of 2025 keep the biases in fp8, too
        weights |= {key: b.to(torch.float8_e4m3fn).float() for key, b in weights.items() if key.endswith(".bias")}
    state, meant = dict(weights), dict(weights)
    for layer in layers:
        weight = weights[f"{layer}.weight"]
        kept, meant[f"{layer}.weight"] = (
            _scaled_fp8(layer, weight) if name == SCALED_FP8 else _by_comfyui(layer, weight, name)
        )
        state |= kept
    if name == SCALED_FP8 and QUANT_ALGOS:
        state["scaled_fp8"] = torch.tensor([], dtype=torch.float8_e4m3fn)
        state, _ = comfy.utils.convert_old_quants(state)
    if QUANT_ALGOS:
        config.quant_config = comfy.utils.detect_layer_quantization(state, "")
    else:
        config.scaled_fp8 = torch.float8_e4m3fn
    config.set_inference_dtype(torch.float32, torch.float32)
    model = config.get_model({}, device=CPU)
    model.diffusion_model.load_state_dict(state)
    return ModelPatcher(model.eval(), CPU, CPU), meant


def _scaled_fp8(layer: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {f"{layer}.weight": codes, f"{layer}.scale_weight": scale}, codes.float() * scale


def _by_comfyui(layer: str, weight: Tensor, name: str) -> tuple[dict[str, Any], Tensor]:
    quantised = QuantizedTensor.from_float(weight, QUANT_ALGOS[name]["comfy_tensor_layout"])
    told = torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)
    return quantised.state_dict(f"{layer}.weight") | {f"{layer}.comfy_quant": told}, quantised.dequantize()
