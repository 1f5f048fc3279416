"""Whose models are measured, on weights that mean nothing: a true layout's, or tiny ones of the same blocks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig

from benchmarks.memory import randomize
from hollow_core.models.base_model import BaseModel, outline, without_data
from hollow_core.nets.conditioning import Conditioning


@dataclass(frozen=True)
class Shape:
    """Of a model."""

    layout: str
    tiny: bool = False
    """The same kinds of blocks, a few channels wide, for pictures of 128 pixels: to try the benchmark without a GPU."""

    def outline(self, dtype: torch.dtype = torch.float32) -> BaseModel:
        """Its model without weights."""
        model = outline(self.layout, dtype)
        assert isinstance(model, BaseModel)
        return _tiny(model, dtype) if self.tiny else model


def give_weights(device: torch.device, *parts: nn.Module | None) -> None:
    """Parts of an outline are on the device from here on, with random weights: of a view, only what it holds."""
    generator = torch.Generator(device).manual_seed(0)
    for part in parts:
        assert part is not None
        randomize(part, generator)


def random_inputs(model: BaseModel) -> tuple[Tensor, Conditioning]:
    """Latents of the native size and a prompt, on the CPU."""
    latents, prompt = model.network.inputs(model.latent_side, model.latent_side)
    scramble(latents, prompt)
    return latents, prompt


def scramble(latents: Tensor, prompt: Conditioning) -> None:
    """Fill them, in place."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (latents, *prompt):
        if tensor is not None:
            tensor.normal_(generator=generator)


def _tiny(model: BaseModel, dtype: torch.dtype) -> BaseModel:
    unet, vae = dict(model.unet.config), dict(model.vae.config) if model.vae is not None else {}
    unet |= {
        "sample_size": 16,
        "norm_num_groups": 4,
        "block_out_channels": [channels // 20 for channels in unet["block_out_channels"]],
        "attention_head_dim": [heads // 5 for heads in unet["attention_head_dim"]],
        "cross_attention_dim": unet["cross_attention_dim"] // 64,
    }
    if model.layout == "sdxl":
        unet |= {
            "transformer_layers_per_block": [1, 2, 2],
            "addition_time_embed_dim": unet["addition_time_embed_dim"] // 64,
            "projection_class_embeddings_input_dim": unet["projection_class_embeddings_input_dim"] // 64,
        }
    else:  # which has enough of them for the cut 5
        unet["layers_per_block"] = 1
    vae |= {"block_out_channels": [4, 4, 8, 8], "norm_num_groups": 2, "sample_size": 128}
    makers: list[Callable[[], nn.Module]] = [
        partial(UNet2DConditionModel.from_config, unet),
        partial(AutoencoderKL.from_config, vae),
    ]
    encoders: tuple[Any, ...] = model.text_encoders
    for encoder in encoders:
        config = encoder.config.to_dict()
        small = {name: config[name] // 64 for name in ("hidden_size", "intermediate_size", "projection_dim")}
        config |= {**small, "num_attention_heads": 2, "num_hidden_layers": 2}
        kind: Any = type(encoder)
        makers.append(partial(kind, CLIPTextConfig.from_dict(config)))
    small_unet, small_vae, *small_encoders = without_data(makers, dtype)
    return replace(model, unet=small_unet, vae=small_vae, text_encoders=tuple(small_encoders), resolution=128)
