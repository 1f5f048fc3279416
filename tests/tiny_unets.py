"""U-Nets with the real layouts and names, small enough for any machine, and prompts that fit them."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from hollow_core.models.layouts import layout_config
from hollow_core.nets.conditioning import Conditioning

SMALL: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": [8, 16, 24, 24], "cross_attention_dim": 12, "attention_head_dim": 2},
    "sd21": {
        "block_out_channels": [8, 16, 24, 24],
        "cross_attention_dim": 16,
        "attention_head_dim": [1, 2, 3, 3],
    },
    "sdxl": {
        "block_out_channels": [8, 16, 24],
        "cross_attention_dim": 20,
        "attention_head_dim": [1, 2, 3],
        "transformer_layers_per_block": [1, 2, 3],
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 16 + 6 * 4,  # pooled text embedding + six sizes
    },
}


def make_tiny_unet(layout: str, seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A random U-Net with the blocks and names of `layout` ("sd15", "sd21", "sdxl"), a few channels wide."""
    config = layout_config(layout) | SMALL[layout] | {"norm_num_groups": 4, "sample_size": 16} | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel.from_config(config).eval()


def make_shallow_unet(layout: str, seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """The same with two levels, of which one has attention: for tests of what is around a U-Net, in a fourth of the
    time. Its cuts are 0 to 3."""
    shallow = {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [8, 24],
        "attention_head_dim": [1, 3],
        "transformer_layers_per_block": 1,
        "layers_per_block": 1,
    }
    return make_tiny_unet(layout, seed, **shallow | changes)


def make_tiny_conditioning(unet: UNet2DConditionModel, batch: int = 1, seed: int = 0, tokens: int = 5) -> Conditioning:
    """A random prompt that fits `unet`."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randn(batch, tokens, unet.config.cross_attention_dim, generator=generator)
    if unet.config.addition_embed_type is None:
        return Conditioning(prompt)
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    sizes = torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]])
    return Conditioning(prompt, torch.randn(batch, width, generator=generator), sizes.repeat(batch, 1))
