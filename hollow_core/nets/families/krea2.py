"""Krea 2: text and image in one sequence; a prompt is the states of several layers of its encoder."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .family import Blocks, Family, grid_ids, packed, renamed, unpacked

if TYPE_CHECKING:
    from torch import Tensor

    from ..conditioning import Conditioning


def _arguments(
    config: Mapping[str, Any], latents: "Tensor", sigmas: "Tensor", prompt: "Conditioning"
) -> dict[str, Any]:
    import torch

    text = prompt.encoder_hidden_states
    return {
        "hidden_states": packed(latents),
        "encoder_hidden_states": text,
        "timestep": sigmas,
        "position_ids": torch.cat([sigmas.new_zeros(text.shape[1], 3), grid_ids(latents, prompt.crop)]),
    }


_LAYERS = (
    ("attn.to_q", "attn.wq"),
    ("attn.to_k", "attn.wk"),
    ("attn.to_v", "attn.wv"),
    ("attn.to_gate", "attn.gate"),
    ("attn.to_out.0", "attn.wo"),
    ("ff.gate", "mlp.gate"),
    ("ff.up", "mlp.up"),
    ("ff.down", "mlp.down"),
)

KREA2 = Family(
    name="krea2",
    title="Krea 2",
    network="Krea2Transformer2DModel",
    pipelines=("Krea2Pipeline",),
    blocks=(Blocks("transformer_blocks", "text first"),),
    kept=("img_in", "time_embed", "txt_in", "final_layer"),
    feed_forward=("ff.gate", "ff.up", "ff.down"),
    original=renamed("transformer_blocks", "blocks", _LAYERS),
    version="krea2",
    architecture="Krea-2",
    prompt_tokens=64,
    guidance=5.5,  # Krea2Pipeline's 4.5, which it adds to 1
    distilled_mu=1.15,
    encoded=("prompt", "mask"),
    source="diffusers 0.42, Krea2Transformer2DModel and Krea2Pipeline",
    arguments=_arguments,
    velocity=lambda config, out, size: unpacked(out, size),
    channels=lambda config: config["in_channels"] // 4,
    text_shape=lambda config: (config["num_text_layers"], config["text_hidden_dim"]),
)
