"""Whole pipelines of tiny random parts, and their weights as an original (LDM) checkpoint names them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from tiny_unets import make_shallow_unet, make_tiny_unet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hollow_core.models.layouts import FOLDER
from hollow_core.nets.unet_layers import to_ldm

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline


def tiny_pipeline(layout: str, **scheduler: object) -> Pipeline:
    """A diffusers pipeline of "sd15", "sd21" or "sdxl" for 128 pixels, random but always the same."""
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            "unet": make_tiny_unet(layout),
            "vae": tiny_vae(),
            "scheduler": DDIMScheduler.from_pretrained(FOLDER / layout, subfolder="scheduler", **scheduler),
            "tokenizer": tokenizer,
        }
        if layout == "sdxl":
            first, second = _clip_config(8), _clip_config(12, projection_dim=16)
            pipeline = StableDiffusionXLPipeline(
                **parts,
                text_encoder=CLIPTextModel(first).eval(),
                text_encoder_2=CLIPTextModelWithProjection(second).eval(),
                tokenizer_2=tokenizer,
            )
        else:
            encoder = CLIPTextModel(_clip_config(parts["unet"].config.cross_attention_dim)).eval()
            pipeline = StableDiffusionPipeline(
                **parts,
                text_encoder=encoder,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def shallow_pipeline(layout: str) -> Pipeline:
    """The same with the U-Net of `make_shallow_unet`."""
    pipeline = tiny_pipeline(layout)
    pipeline.register_modules(unet=make_shallow_unet(layout))
    return pipeline


def tiny_vae() -> AutoencoderKL:
    """Eight pixels a latent, as in Stable Diffusion."""
    return AutoencoderKL(
        block_out_channels=[4, 4, 8, 8],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        norm_num_groups=2,
        sample_size=128,
    ).eval()


def _clip_config(width: int, projection_dim: int = 8) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=2,
        num_hidden_layers=3,
        projection_dim=projection_dim,
        eos_token_id=2,
    )


def original_checkpoint(pipeline: Pipeline, layout: str) -> dict[str, torch.Tensor]:
    """All weights of the pipeline under the names and in the shapes of an original checkpoint."""
    unet, vae = pipeline.unet, pipeline.vae
    tensors = {f"model.diffusion_model.{to_ldm(unet.config, k)}": v for k, v in unet.state_dict().items()}
    levels = len(vae.config.block_out_channels)
    tensors |= {f"first_stage_model.{_vae_name(k, levels)}": _conv(k, v) for k, v in vae.state_dict().items()}
    clip = {k.removeprefix("text_model."): v for k, v in pipeline.text_encoder.state_dict().items()}
    if layout == "sd15":
        tensors |= {f"cond_stage_model.transformer.text_model.{k}": v for k, v in clip.items()}
    elif layout == "sd21":
        tensors |= {f"cond_stage_model.model.{k}": v for k, v in _open_clip(clip).items()}
    else:
        tensors |= {f"conditioner.embedders.0.transformer.text_model.{k}": v for k, v in clip.items()}
        second = {k.removeprefix("text_model."): v for k, v in pipeline.text_encoder_2.state_dict().items()}
        tensors |= {f"conditioner.embedders.1.model.{k}": v for k, v in _open_clip(second).items()}
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def write_holes(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file of tensors of these shapes, fp16 or fp32, all zeros that take no room on the disk."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        kind = {torch.float16: "F16", torch.float32: "F32"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _vae_name(key: str, levels: int) -> str:
    key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", key)
    key = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
    for ours, theirs in (
        ("down_blocks", "down"),
        ("resnets", "block"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.attentions.0.to_", "mid.attn_1."),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    ):
        key = key.replace(ours, theirs)
    return key


def _conv(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """The original VAE attends with 1×1 convolutions."""
    return tensor[..., None, None] if re.search(r"attentions\.0\.to_.*weight", key) else tensor


def _open_clip(clip: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {
        "positional_embedding": clip["embeddings.position_embedding.weight"],
        "token_embedding.weight": clip["embeddings.token_embedding.weight"],
        "ln_final.weight": clip["final_layer_norm.weight"],
        "ln_final.bias": clip["final_layer_norm.bias"],
    }
    if "text_projection.weight" in clip:
        tensors["text_projection"] = clip["text_projection.weight"].T
    for key, tensor in clip.items():
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", key):
            layer, inner = f"transformer.resblocks.{match[1]}", match[2]
            if inner.startswith("self_attn.q_proj"):
                kind = inner.rpartition(".")[2]
                parts = [clip[key.replace("q_proj", f"{name}_proj")] for name in "qkv"]
                tensors[f"{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
            elif not re.match(r"self_attn\.[kv]_proj", inner):
                inner = inner.replace("self_attn", "attn").replace("layer_norm", "ln_")
                tensors[f"{layer}.{inner.replace('mlp.fc1', 'mlp.c_fc').replace('mlp.fc2', 'mlp.c_proj')}"] = tensor
    return tensors
