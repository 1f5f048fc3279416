"""Stable Diffusion 3 and 3.5: two streams, of which the last block leaves the image's alone."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .family import BOTH_STREAMS, Blocks, Family, of_crop, renamed, with_method

if TYPE_CHECKING:
    from torch import Tensor

    from ...data.patches import Place
    from ..conditioning import Conditioning


def _called(network: Any, place: "Place | None") -> Any:
    """Codes are cut from the middle of a table, as large as the whole is."""
    if place is None:
        return network
    embed, side = network.pos_embed, network.pos_embed.patch_size

    def cropped(height: int, width: int) -> "Tensor":
        whole = embed.cropped_pos_embed(place.rows * side, place.columns * side)
        return of_crop(whole, place, (height // side, width // side))

    return with_method(network, "pos_embed", "cropped_pos_embed", cropped)


def _arguments(
    config: Mapping[str, Any], latents: "Tensor", sigmas: "Tensor", prompt: "Conditioning"
) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "encoder_hidden_states": prompt.encoder_hidden_states,
        "pooled_projections": prompt.text_embeds,
        "timestep": sigmas * 1000,
    }


_LAYERS = (
    ("norm1.linear", "x_block.adaLN_modulation.1"),
    ("attn.to_q", "x_block.attn.qkv"),
    ("attn.to_k", "x_block.attn.qkv"),
    ("attn.to_v", "x_block.attn.qkv"),
    ("attn.to_out.0", "x_block.attn.proj"),
    ("attn2.to_q", "x_block.attn2.qkv"),
    ("attn2.to_k", "x_block.attn2.qkv"),
    ("attn2.to_v", "x_block.attn2.qkv"),
    ("attn2.to_out.0", "x_block.attn2.proj"),
    ("attn.add_q_proj", "context_block.attn.qkv"),
    ("attn.add_k_proj", "context_block.attn.qkv"),
    ("attn.add_v_proj", "context_block.attn.qkv"),
    ("attn.to_add_out", "context_block.attn.proj"),
    ("ff.net.0.proj", "x_block.mlp.fc1"),
    ("ff.net.2", "x_block.mlp.fc2"),
    ("ff_context.net.0.proj", "context_block.mlp.fc1"),
    ("ff_context.net.2", "context_block.mlp.fc2"),
)

SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3.5",
    network="SD3Transformer2DModel",
    pipelines=("StableDiffusion3Pipeline",),
    blocks=(Blocks("transformer_blocks", "two"),),
    kept=("pos_embed", "context_embedder", "time_text_embed", "norm_out", "proj_out"),
    attention=BOTH_STREAMS,
    feed_forward=("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    # as FLUX.1; diffusers does not read kohya's
    dialects=("diffusers", "kohya", "peft"),
    original=renamed("transformer_blocks", "joint_blocks", _LAYERS),
    architecture="stable-diffusion-3",
    prompt_tokens=333,  # CLIP's 77 and T5's 256
    guidance=4.5,
    own_steps=True,
    text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    tokenizers=("tokenizer", "tokenizer_2", "tokenizer_3"),
    max_tokens=256,
    encoding={"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False},
    encoded=("prompt", "negative prompt", "pooled"),
    source="diffusers 0.42, SD3Transformer2DModel and StableDiffusion3Pipeline",
    called=_called,
    arguments=_arguments,
    pooled_width=lambda config: config["pooled_projection_dim"],
)
