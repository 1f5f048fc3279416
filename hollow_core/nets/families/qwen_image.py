"""Qwen-Image: two streams to the end; prompts are as long as they are."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .family import BOTH_STREAMS, Blocks, Family, of_crop, packed, told_guidance, unpacked, with_method

if TYPE_CHECKING:
    from torch import Tensor

    from ...data.patches import Place
    from ..conditioning import Conditioning


def _called(network: Any, place: "Place | None") -> Any:
    """Places are counted from the middle of the whole, and those of the text behind it."""
    if place is None:
        return network

    def forward(shapes: Any, **more: Any) -> "tuple[Tensor, Tensor]":
        image, text = network.pos_embed([[(1, place.rows, place.columns)]], **more)
        return of_crop(image, place, shapes[0][0][1:]), text

    return with_method(network, "pos_embed", "forward", forward)


def _arguments(
    config: Mapping[str, Any], latents: "Tensor", sigmas: "Tensor", prompt: "Conditioning"
) -> dict[str, Any]:
    height, width = latents.shape[-2:]
    return {
        "hidden_states": packed(latents),
        "encoder_hidden_states": prompt.encoder_hidden_states,
        "timestep": sigmas,
        "img_shapes": [[(1, height // 2, width // 2)]] * len(latents),
        "guidance": told_guidance(config, sigmas, prompt),
    }


def _guided(seen: "Tensor", unseen: "Tensor", scale: float) -> "Tensor":
    """Each token as long as it is without guidance."""
    size = (seen.shape[-2], seen.shape[-1])
    own, guided = packed(seen), packed(unseen + scale * (seen - unseen))
    return unpacked(guided * (own.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)), size)


QWEN_IMAGE = Family(
    name="qwen-image",
    title="Qwen-Image",
    network="QwenImageTransformer2DModel",
    pipelines=("QwenImagePipeline",),
    blocks=(Blocks("transformer_blocks", "two"),),
    kept=("img_in", "txt_in", "time_text_embed", "norm_out", "proj_out"),
    attention=BOTH_STREAMS,
    feed_forward=("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    dialects=("comfy", "diffusers", "peft", "kohya"),
    version="qwen_image",
    architecture="Qwen-Image",
    prompt_tokens=64,
    guidance=4.0,
    encoded=("prompt", "mask"),
    guided=_guided,
    source="diffusers 0.42, QwenImageTransformer2DModel and QwenImagePipeline",
    called=_called,
    arguments=_arguments,
    velocity=lambda config, out, size: unpacked(out, size),
    channels=lambda config: config["in_channels"] // 4,
)
