"""The embedded model as ComfyUI's own MODEL, CLIP and VAE, so that every built-in node works on it."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.clip_model
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny


def demo_model() -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of the embedded model, offloaded until ComfyUI needs them."""
    from diffusers import AutoencoderTiny

    from ...hollow_core.demo.run import MODEL
    from ...hollow_core.models.parts import quiet

    with quiet():
        autoencoder = AutoencoderTiny.from_pretrained(MODEL / "vae", torch_dtype=torch.float32, local_files_only=True)
    return _model(MODEL, autoencoder), _clip(MODEL), _vae(autoencoder)


def demo_images() -> tuple[list[Tensor], list[str]]:
    """The five pictures of `hollow demo`'s subject, each (1, 64, 64, 3) in 0…1, and their captions."""
    from ...hollow_core.demo import run, world

    references = list(run.captioned_references(world.HELD_OUT[0]))
    images = [world.to_tensor([picture]).add(1).div(2).movedim(1, -1) for _, picture, _ in references]
    return images, [caption for _, _, caption in references]


# MODEL


class _Multiple(float):
    """A width as a multiple of the first one: 2.5 × 32 channels are 80, a whole number as UNetModel needs it."""

    def __mul__(self, other: int) -> int:  # type: ignore[override]
        return round(super().__mul__(other))

    __rmul__ = __mul__  # type: ignore[assignment]


class _ModelConfig(comfy.supported_models_base.BASE):
    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012  # what ComfyUI would add to every U-Net's config
    supported_inference_dtypes = [torch.float32]  # noqa: RUF012  # so small a model gains nothing from fewer bits

    def model_type(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.V_PREDICTION

    def inpaint_model(self) -> bool:
        return False  # ComfyUI guesses so from more than four latent channels


def _model(folder: Path, autoencoder: "AutoencoderTiny") -> ModelPatcher:
    from ...hollow_core.files import read_json, read_safetensors
    from ...hollow_core.nets.unet_layers import to_ldm

    unet = read_json(folder / "unet" / "config.json")
    weights, _ = read_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors")
    management = comfy.model_management
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()

    config = _ModelConfig(_unet_config(unet))
    dtype = management.unet_dtype(load_device, supported_dtypes=config.supported_inference_dtypes)
    cast = management.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    config.custom_operations = _operations(comfy.ops.pick_operations(dtype, cast), unet["norm_num_groups"])
    config.sampling_settings = _sampling_settings(read_json(folder / "scheduler" / "scheduler_config.json"))
    _describe_latents(config.latent_format, autoencoder)

    model = config.get_model({})
    # Cast, as under dynamic VRAM a layer takes the dtype of what it loads, and nothing casts it on the way.
    model.diffusion_model.load_state_dict({to_ldm(unet, name): weight.to(dtype) for name, weight in weights.items()})
    return ModelPatcher(model.to(offload_device).eval(), load_device=load_device, offload_device=offload_device)


def _unet_config(unet: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers config in the terms of ComfyUI's UNetModel and of its LoRA loader."""
    from ...hollow_core.nets.unet_layers import layers

    first, *_ = widths = unet["block_out_channels"]
    depth = unet["transformer_layers_per_block"]
    depths = {
        side: [
            depth * (layer.kind == "RA") for layer in layers(unet) if layer.side == side and layer.kind in ("R", "RA")
        ]
        for side in ("down", "up")
    }
    return {
        "image_size": unet["sample_size"],
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "model_channels": first,
        "channel_mult": [_Multiple(width / first) for width in widths],
        "num_res_blocks": [unet["layers_per_block"]] * len(widths),
        "num_heads": unet["attention_head_dim"],  # diffusers' old name for the number of heads
        "context_dim": unet["cross_attention_dim"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": unet["use_linear_projection"],
        "transformer_depth": depths["down"],
        "transformer_depth_middle": depth,
        "transformer_depth_output": depths["up"][::-1],  # ComfyUI lists the outermost level first
        "legacy": False,
    }


def _operations(base: Any, groups: int) -> Any:
    """`base`, a class of layers, with as many groups in every norm: UNetModel always asks for 32."""

    class Operations(base):
        class GroupNorm(base.GroupNorm):
            def __init__(self, num_groups: int, num_channels: int, **settings: Any) -> None:
                super().__init__(groups, num_channels, **settings)

    return Operations


def _sampling_settings(schedule: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "beta_schedule": "linear",  # ComfyUI's name for "scaled_linear"
        "linear_start": schedule["beta_start"],
        "linear_end": schedule["beta_end"],
        "timesteps": schedule["num_train_timesteps"],
        "zsnr": schedule["rescale_betas_zero_snr"],
    }


@torch.no_grad()
def _describe_latents(latent_format: Any, autoencoder: "AutoencoderTiny") -> None:
    """Set channels, scale, and the colours by which ComfyUI previews latents: a least-squares fit on the sample."""
    pixels = torch.cat(demo_images()[0]).movedim(-1, 1) * 2 - 1
    latents = autoencoder.encode(pixels).latents.movedim(1, -1)
    colors = F.interpolate(pixels, latents.shape[1:3], mode="area").movedim(1, -1)
    with_bias = F.pad(latents, (0, 1), value=1.0).flatten(0, 2)
    *factors, bias = torch.linalg.lstsq(with_bias, colors.flatten(0, 2)).solution.tolist()
    latent_format.latent_channels = autoencoder.config.latent_channels
    latent_format.scale_factor = autoencoder.config.scaling_factor
    latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias = factors, bias


# CLIP

_SPECIAL_TOKENS = {"start": "bos", "end": "eos", "pad": "pad"}  # ComfyUI's names and those of transformers


class _TextModel(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP with the vocabulary of its config instead of OpenAI's."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, device: torch.device, operations: Any) -> None:
        super().__init__(config, dtype, device, operations)
        tokens = operations.Embedding(config["vocab_size"], config["hidden_size"], dtype=dtype, device=device)
        self.set_input_embeddings(tokens)


def _clip(folder: Path) -> comfy.sd.CLIP:
    from ...hollow_core.files import read_json, read_safetensors

    config = read_json(folder / "text_encoder" / "config.json")
    weights, _ = read_safetensors(folder / "text_encoder" / "model.safetensors")
    length, width = config["max_position_embeddings"], config["hidden_size"]
    encoder = partial(
        comfy.sd1_clip.SDClipModel,
        max_length=length,
        textmodel_json_config=config,
        model_class=_TextModel,
        special_tokens={name: config[f"{key}_token_id"] for name, key in _SPECIAL_TOKENS.items()},
        return_projected_pooled=False,
    )
    tokenizer = partial(
        comfy.sd1_clip.SDTokenizer,
        tokenizer_path=str(folder / "tokenizer"),
        max_length=length,
        embedding_size=width,
        pad_token=config["pad_token_id"],
    )
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(
            partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer),
            partial(comfy.sd1_clip.SD1ClipModel, clip_model=encoder),
        )
    )
    transformer = clip.cond_stage_model.clip_l.transformer
    state = {f"text_model.{name}": weight for name, weight in weights.items()}
    state["text_projection.weight"] = torch.eye(width)  # the model has none, ComfyUI's always does
    transformer.load_state_dict({name: weight.to(transformer.dtype) for name, weight in state.items()})
    return clip


# VAE


class _Autoencoder(nn.Module):
    """diffusers' autoencoder as ComfyUI calls one: pixels in −1…1, and tensors without a wrapping.

    It moves to its input: with --novram ComfyUI leaves behind every layer that is not of its own kind.
    """

    def __init__(self, autoencoder: "AutoencoderTiny") -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def encode(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) to latents (batch, 8, height / 4, width / 4)."""
        return self.autoencoder.to(pixels.device).encode(pixels).latents

    def decode(self, latents: Tensor) -> Tensor:
        """The way back."""
        return self.autoencoder.to(latents.device).decode(latents).sample


def _vae(autoencoder: "AutoencoderTiny") -> comfy.sd.VAE:
    """ComfyUI's VAE knows its kinds by their weights; this takes the simplest of them and puts another model in."""
    vae = comfy.sd.VAE({"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    vae.first_stage_model = _Autoencoder(autoencoder).eval()
    devices = vae.patcher.load_device, vae.patcher.offload_device
    vae.patcher = ModelPatcher(vae.first_stage_model, *devices)
    widths = autoencoder.config.decoder_block_out_channels
    ratio = autoencoder.config.upsampling_scaling_factor ** (len(widths) - 1)
    vae.latent_channels = autoencoder.config.latent_channels
    vae.downscale_ratio = vae.upscale_ratio = ratio
    bytes_per_pixel = 4 * max(widths) * comfy.model_management.dtype_size(vae.vae_dtype)  # four copies of the widest
    vae.memory_used_encode = lambda shape, dtype: bytes_per_pixel * shape[2] * shape[3]
    vae.memory_used_decode = lambda shape, dtype: bytes_per_pixel * shape[2] * shape[3] * ratio**2
    return vae
