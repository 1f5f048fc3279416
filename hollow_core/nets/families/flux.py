"""FLUX.1: two streams, then both in one block after another; the text comes from T5 and, pooled, from CLIP."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .family import BOTH_STREAMS, Blocks, Family, grid_ids, packed, renamed, told_guidance, unpacked

if TYPE_CHECKING:
    from torch import Tensor

    from ..conditioning import Conditioning


def _arguments(
    config: Mapping[str, Any], latents: "Tensor", sigmas: "Tensor", prompt: "Conditioning"
) -> dict[str, Any]:
    return {
        "hidden_states": packed(latents),
        "encoder_hidden_states": prompt.encoder_hidden_states,
        "pooled_projections": prompt.text_embeds,
        "timestep": sigmas,
        "img_ids": grid_ids(latents, prompt.crop),
        "txt_ids": sigmas.new_zeros(prompt.encoder_hidden_states.shape[1], 3),
        "guidance": told_guidance(config, sigmas, prompt),
    }


_IMAGE_AND_TEXT = (
    ("norm1.linear", "img_mod.lin"),
    ("norm1_context.linear", "txt_mod.lin"),
    ("attn.to_q", "img_attn.qkv"),
    ("attn.to_k", "img_attn.qkv"),
    ("attn.to_v", "img_attn.qkv"),
    ("attn.to_out.0", "img_attn.proj"),
    ("attn.add_q_proj", "txt_attn.qkv"),
    ("attn.add_k_proj", "txt_attn.qkv"),
    ("attn.add_v_proj", "txt_attn.qkv"),
    ("attn.to_add_out", "txt_attn.proj"),
    ("ff.net.0.proj", "img_mlp.0"),
    ("ff.net.2", "img_mlp.2"),
    ("ff_context.net.0.proj", "txt_mlp.0"),
    ("ff_context.net.2", "txt_mlp.2"),
)
_JOINED = (
    ("norm.linear", "modulation.lin"),
    ("attn.to_q", "linear1"),
    ("attn.to_k", "linear1"),
    ("attn.to_v", "linear1"),
    ("proj_mlp", "linear1"),
    ("proj_out", "linear2"),
)

FLUX = Family(
    name="flux",
    title="FLUX.1",
    network="FluxTransformer2DModel",
    pipelines=("FluxPipeline",),
    blocks=(Blocks("transformer_blocks", "two"), Blocks("single_transformer_blocks", "two")),
    kept=("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out"),
    attention=BOTH_STREAMS,
    feed_forward=("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
    # ComfyUI reads diffusers' names as "transformer.…" alone, and under "diffusion_model." its own, which are fused
    dialects=("diffusers", "kohya", "peft"),
    original=renamed("transformer_blocks", "double_blocks", _IMAGE_AND_TEXT)
    + renamed("single_transformer_blocks", "single_blocks", _JOINED),
    version="flux1",
    architecture="flux-1-dev",
    prompt_tokens=512,
    guidance=3.5,
    text_encoders=("text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    encoding={"prompt_2": None},
    encoded=("prompt", "pooled"),
    source="diffusers 0.42, FluxTransformer2DModel and FluxPipeline; the dev model is distilled for guidance",
    arguments=_arguments,
    velocity=lambda config, out, size: unpacked(out, size),
    channels=lambda config: config["in_channels"] // 4,
    pooled_width=lambda config: config["pooled_projection_dim"],
)
