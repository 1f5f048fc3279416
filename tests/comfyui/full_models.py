"""Checkpoints of the true shapes of public models, with random weights, as their makers would publish them."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from tiny_pipelines import original_checkpoint
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from hollow_core.models.layouts import FOLDER, layout_config


def save_full_checkpoint(path: Path, layout: str) -> None:
    """A checkpoint of "sd15", "sd21" or "sdxl" in fp16: U-Net, VAE and text encoders; always the same."""
    with torch.device("meta"):
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(layout_config(layout)),
            "vae": AutoencoderKL.from_config(_config(layout, "vae")),
            "text_encoder": CLIPTextModel(_text_config(layout, "text_encoder")),
        }
        if layout == "sdxl":
            parts["text_encoder_2"] = CLIPTextModelWithProjection(_text_config(layout, "text_encoder_2"))
    generator = torch.Generator().manual_seed(0)
    filled = SimpleNamespace(**{name: _random(part, generator) for name, part in parts.items()})
    save_file(original_checkpoint(filled, layout), path)


def _config(layout: str, part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((FOLDER / layout / part / "config.json").read_text())
    return config


def _text_config(layout: str, part: str) -> CLIPTextConfig:
    config = CLIPTextConfig(**_config(layout, part))
    if layout == "sd21":  # diffusers leaves the last layer out, which nobody uses; the original holds it
        config.num_hidden_layers = 24
    return config


def _random(part: nn.Module, generator: torch.Generator) -> nn.Module:
    part = part.half().to_empty(device="cpu")
    for name, parameter in part.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 1 / math.sqrt(3 * parameter[0].numel()), generator=generator)
        else:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
    return part.eval()
