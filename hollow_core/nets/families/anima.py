"""Anima and Cosmos Predict 2: the image alone passes the blocks, and hears the text by cross-attention."""

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .family import Blocks, Family, of_crop, renamed, with_method

if TYPE_CHECKING:
    from torch import Tensor

    from ...data.patches import Place
    from ..conditioning import Conditioning


def _called(network: Any, place: "Place | None") -> Any:
    """A padding mask, which for a picture is all zeros, diffusers resizes by torchvision; as a condition mask it is
    handed in whole. Codes are those of a whole picture."""
    view = network
    if network.config.concat_padding_mask:
        view = copy.copy(network)
        view.register_to_config(concat_padding_mask=False)
    if place is None:
        return view
    view = with_method(view, "rope", "forward", _cropped(network.rope, place))
    if network.config.extra_pos_embed_type:
        view = with_method(view, "learnable_pos_embed", "forward", _cropped(network.learnable_pos_embed, place))
    return view


def _cropped(codes: Any, place: "Place") -> Callable[..., Any]:
    """What gives, of the codes for a whole, those for a crop."""
    _, rows, columns = codes.patch_size

    def forward(latents: "Tensor", **more: Any) -> Any:
        size = latents.shape[-2] // rows, latents.shape[-1] // columns
        whole = latents.new_empty(*latents.shape[:-2], place.rows * rows, place.columns * columns)
        found = codes(whole, **more)
        if isinstance(found, tuple):
            return tuple(of_crop(each, place, size) for each in found)
        return of_crop(found, place, size)

    return forward


def _arguments(
    config: Mapping[str, Any], latents: "Tensor", sigmas: "Tensor", prompt: "Conditioning"
) -> dict[str, Any]:
    return {
        "hidden_states": latents.unsqueeze(2),
        "timestep": sigmas,
        "encoder_hidden_states": prompt.encoder_hidden_states,
        "condition_mask": latents.new_zeros(len(latents), 1, 1, *latents.shape[-2:])
        if config["concat_padding_mask"]
        else None,
    }


_LAYERS = (
    ("norm1.linear_1", "adaln_modulation_self_attn.1"),
    ("norm1.linear_2", "adaln_modulation_self_attn.2"),
    ("norm2.linear_1", "adaln_modulation_cross_attn.1"),
    ("norm2.linear_2", "adaln_modulation_cross_attn.2"),
    ("norm3.linear_1", "adaln_modulation_mlp.1"),
    ("norm3.linear_2", "adaln_modulation_mlp.2"),
    ("attn1.to_q", "self_attn.q_proj"),
    ("attn1.to_k", "self_attn.k_proj"),
    ("attn1.to_v", "self_attn.v_proj"),
    ("attn1.to_out.0", "self_attn.output_proj"),
    ("attn2.to_q", "cross_attn.q_proj"),
    ("attn2.to_k", "cross_attn.k_proj"),
    ("attn2.to_v", "cross_attn.v_proj"),
    ("attn2.to_out.0", "cross_attn.output_proj"),
    ("ff.net.0.proj", "mlp.layer1"),
    ("ff.net.2", "mlp.layer2"),
)


def _encoded(family: Family, parts: Mapping[str, Any], text: str, device: Any, tokens: int) -> "Conditioning":
    """As the steps of its modular pipeline: Qwen reads the prompt, and what it says is put in T5's words."""
    from types import SimpleNamespace

    from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep

    from ..conditioning import Conditioning

    here = SimpleNamespace(**parts)
    read = AnimaTextEncoderStep.encode_prompt(
        here, text, prepare_unconditional_embeds=False, max_sequence_length=tokens, device=device
    )
    dtype = next(here.text_conditioner.parameters()).dtype
    return Conditioning(
        here.text_conditioner(
            source_hidden_states=read["qwen_prompt_embeds"].to(dtype=dtype),
            target_input_ids=read["t5_input_ids"],
            target_attention_mask=read["t5_attention_mask"],
            source_attention_mask=read["qwen_attention_mask"],
        )
    )


ANIMA = Family(
    name="anima",
    title="Anima",
    network="CosmosTransformer3DModel",
    pipelines=("AnimaModularPipeline",),
    blocks=(Blocks("transformer_blocks", "image"),),
    kept=("patch_embed", "time_embed", "norm_out", "proj_out"),
    feed_forward=("ff.net.0.proj", "ff.net.2"),
    # ComfyUI knows its own names alone, which diffusers reads as "diffusion_model.….lora_A", not as kohya's
    dialects=("comfy", "diffusers", "peft", "kohya"),
    original=renamed("transformer_blocks", "blocks", _LAYERS),
    version="anima",
    architecture="anima",
    prompt_tokens=512,
    guidance=4.0,
    text_encoders=("text_encoder", "text_conditioner"),
    tokenizers=("tokenizer", "t5_tokenizer"),
    encode=_encoded,
    source="diffusers 0.42, CosmosTransformer3DModel and the modular pipeline of Anima",
    called=_called,
    arguments=_arguments,
    velocity=lambda config, out, size: out.squeeze(2),
    text_shape=lambda config: (config["text_embed_dim"],),
)
