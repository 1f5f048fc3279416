"""A small random network of every family, by diffusers' own class."""

from typing import Any

import diffusers
import pytest
import torch

from hollow_core.nets.conditioning import Conditioning
from hollow_core.nets.families import FAMILIES
from hollow_core.nets.transformer import Transformer

SIZES: dict[str, dict[str, Any]] = {
    "flux": {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "guidance_embeds": True,
        "axes_dims_rope": (2, 2, 4),
    },
    "z-image": {
        "in_channels": 4,
        "dim": 16,
        "n_layers": 4,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 12,
        "axes_dims": [2, 2, 4],
        "axes_lens": [128, 32, 32],
    },
    "qwen-image": {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "axes_dims_rope": (2, 2, 4),
    },
    "sd3": {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
    },
    "krea2": {
        "in_channels": 16,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "timestep_embed_dim": 8,
        "text_hidden_dim": 12,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (2, 2, 4),
    },
    "anima": {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "text_embed_dim": 12,
        "adaln_lora_dim": 8,
        "max_size": (4, 32, 32),
        "concat_padding_mask": True,
        "extra_pos_embed_type": None,
    },
}

FAMILY_NAMES = [family.name for family in FAMILIES.values()]


def tiny_transformer(name: str, seed: int = 0) -> Transformer:
    """With nothing at zero, where networks usually start: gates and residuals are to have an effect."""
    (family,) = (family for family in FAMILIES.values() if family.name == name)
    if not hasattr(diffusers, family.network):
        pytest.skip(f"diffusers {diffusers.__version__} has no {family.network}")
    torch.manual_seed(seed)  # the constructors of diffusers take no generator
    network = getattr(diffusers, family.network)(**SIZES[name]).eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.dim() > 1 or not parameter.any():
            parameter.normal_(0, 0.2)
    return Transformer(network)


def tiny_prompt(network: Transformer, tokens: int = 5, seed: int = 1) -> Conditioning:
    """Of random numbers."""
    generator, config, family = torch.Generator().manual_seed(seed), network.config, network.family
    pooled = family.pooled_width(config)
    return Conditioning(
        torch.randn(1, tokens, *family.text_shape(config), generator=generator),
        None if pooled is None else torch.randn(1, pooled, generator=generator),
    )


def tiny_latents(network: Transformer, height: int = 8, width: int = 6, seed: int = 2) -> torch.Tensor:
    """Of random numbers: (1, channels, height, width)."""
    channels = network.family.channels(network.config)
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(seed))
