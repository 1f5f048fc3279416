"""Tiny random models as ComfyUI's MODEL and as diffusers' U-Net, both of the same weights."""

from typing import Any

import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.model_patcher import ModelPatcher
from diffusers import UNet2DConditionModel

from hollow_core.models.layouts import layout_config
from hollow_core.nets.unet_layers import to_ldm

CPU = torch.device("cpu")
SIZE = 16  # of the latents: less, and the deepest norms would see single pixels
TOKEN_WIDTH = 16
POOLED_WIDTH = 8

_DIFFUSERS: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": [32, 64, 128, 128], "cross_attention_dim": TOKEN_WIDTH},
    "sdxl": {
        "block_out_channels": [32, 64, 128],
        "cross_attention_dim": TOKEN_WIDTH,
        "attention_head_dim": [1, 1, 2],
        "transformer_layers_per_block": [1, 1, 2],
        "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * 256,
    },
}
_COMFYUI: dict[str, dict[str, Any]] = {
    "sd15": {
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
    },
    "sdxl": {
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 1, 1, 2, 2],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
        "transformer_depth_middle": 2,
        "use_linear_in_transformer": True,
        "adm_in_channels": POOLED_WIDTH + 6 * 256,
        "num_classes": "sequential",
    },
}
_BOTH = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "context_dim": TOKEN_WIDTH,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
}


def tiny_unet(layout: str) -> UNet2DConditionModel:
    """Of "sd15" or "sdxl", random but always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel.from_config(layout_config(layout) | _DIFFUSERS[layout]).eval()


def tiny_config(layout: str) -> Any:
    """What ComfyUI knows of it before it is made."""
    kind = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}[layout]
    return kind(_COMFYUI[layout] | _BOTH)


def tiny_model(
    layout: str, *, storage: torch.dtype = torch.float32, patcher: type[ModelPatcher] = ModelPatcher
) -> ModelPatcher:
    """The same network as ComfyUI's MODEL, which stores its weights as `storage` and computes in fp32."""
    config = tiny_config(layout)
    config.set_inference_dtype(storage, None if storage == torch.float32 else torch.float32)
    unet = tiny_unet(layout)
    weights = {to_ldm(unet.config, key): weight for key, weight in unet.state_dict().items()}
    model = config.get_model({}, device=CPU)
    model.diffusion_model.load_state_dict({key: weight.to(storage) for key, weight in weights.items()})
    return patcher(model.eval(), CPU, CPU)


def tiny_flux() -> ModelPatcher:
    """A MODEL that is no U-Net."""
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
    config = comfy.supported_models.Flux(
        {
            **{"image_model": "flux", "guidance_embed": True, "in_channels": 16, "out_channels": 16, "patch_size": 2},
            **{"vec_in_dim": 8, "context_in_dim": 8, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1},
            **{"depth_single_blocks": 1, "axes_dim": [4, 6, 6], "theta": 10000, "qkv_bias": True},
            **newer,
        }
    )
    return ModelPatcher(config.get_model({}, device=CPU), CPU, CPU)
