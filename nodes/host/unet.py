"""ComfyUI's MODEL as a diffusers U-Net with its noise schedule, sharing memory wherever it can."""

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import comfy.lora
import comfy.model_base
import comfy.model_patcher
import comfy.model_sampling
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...hollow_core.errors import HollowError
from ..handles import HollowedModel

if TYPE_CHECKING:
    from ...hollow_core.nets.schedule import NoiseSchedule, PredictionKind
    from ...hollow_core.nets.unet import UNet

PREFIX = "diffusion_model."
_SAMPLE_SIZES = {768: 64, 1024: 64}  # by the width of the text; ComfyUI's own is the same for all


def unet_of(model: ModelPatcher) -> UNetModel:
    """The MODEL's network, patched in or its own. Raises HollowError where it is no U-Net."""
    network = model.get_model_object("diffusion_model")
    if not isinstance(network, UNetModel):
        name = type(model.model).__name__
        raise HollowError(f"This MODEL is a {name}, which has no U-Net to hollow. Load an SD1.5, SD2.1 or SDXL one.")
    return network


def check_unet(model: ModelPatcher) -> UNetModel:
    """The MODEL's network. Raises HollowError unless it is one that training knows, of Stable Diffusion 1, 2 or XL."""
    network, name = unet_of(model), type(model.model).__name__
    inside, outside = network.in_channels, network.out_channels
    if inside != outside:
        raise HollowError(
            f"This U-Net takes {inside} channels and gives {outside}. Use a model that is not for inpainting."
        )
    if (pooled := getattr(model.model, "adm_channels", 0)) and not isinstance(model.model, comfy.model_base.SDXL):
        raise HollowError(f"A {name} is told {pooled} numbers that training has not. Use an SD1.5, SD2.1 or SDXL base.")
    return network


def unet_config(model: ModelPatcher) -> dict[str, Any]:
    """The config that diffusers would write for the MODEL's U-Net. Raises HollowError as `check_unet` does."""
    network, config = check_unet(model), model.model.model_config.unet_config
    channels = [int(config["model_channels"] * multiple) for multiple in config["channel_mult"]]
    layers = list(config["num_res_blocks"])
    depths = [config["transformer_depth"][sum(layers[:level])] for level in range(len(layers))]
    per_head, image_size = config.get("num_head_channels", -1), config["image_size"]
    heads = [config["num_heads"] if per_head == -1 else width // per_head for width in channels]
    described: dict[str, Any] = {
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "block_out_channels": channels,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": [depth or 1 for depth in depths],
        "attention_head_dim": heads,  # diffusers' name for the number of heads
        "cross_attention_dim": config["context_dim"],
        "use_linear_projection": bool(config.get("use_linear_in_transformer")),
        "norm_num_groups": network.out[0].num_groups,
        "sample_size": 128 if model.model.adm_channels else _SAMPLE_SIZES.get(config["context_dim"], image_size),
    }
    if model.model.adm_channels:
        described |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": model.model.adm_channels,
        }
    _check_layers(model, described)
    return described


def _check_layers(model: ModelPatcher, config: dict[str, Any]) -> None:
    """Raises HollowError where the MODEL's U-Net has other layers than its config tells: distilled ones lack some."""
    found = {key for key in unet_of(model).state_dict() if key.endswith((".weight", ".bias"))}
    if other := _ldm_names(json.dumps(config)) ^ found:
        name, which = type(model.model.model_config).__name__, "has" if min(other) in found else "lacks"
        raise HollowError(
            f"This {name} {which} {min(other)}, unlike SD1.5, SD2.1 and SDXL, which training knows. Load one of these."
        )


@lru_cache(maxsize=4)
def _ldm_names(config: str) -> frozenset[str]:
    """Of every weight and bias of a U-Net that diffusers would make of this config, the original's names."""
    from diffusers import UNet2DConditionModel

    from ...hollow_core.nets.unet_layers import to_ldm

    described = json.loads(config)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(described)
    return frozenset(to_ldm(described, key) for key in unet.state_dict())


def base_dtype(model: ModelPatcher) -> torch.dtype:
    """In which `diffusers_unet` keeps the MODEL's weights: that in which ComfyUI computes with them."""
    dtype: torch.dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    return dtype


def frozen_network(hollowed: HollowedModel, device: torch.device) -> "UNet":
    """`diffusers_unet`, quantised and streamed to `device` as was chosen, which leaves the MODEL as it is."""
    from ...hollow_core.nets.residency import quantize, stream
    from ...hollow_core.nets.unet import UNet

    network = UNet(diffusers_unet(hollowed.model))
    if hollowed.base_bits is not None:
        quantize(network.module, hollowed.base_bits, network.kept)
    if hollowed.streaming:
        stream(network.module, device, network.kept)
    return network


@torch.no_grad()
def diffusers_unet(model: ModelPatcher) -> Any:
    """A `UNet2DConditionModel` of the MODEL's weights, as the graph's patches leave them, on the CPU or wherever
    ComfyUI keeps them. Patched and 8-bit weights are copies, all others share ComfyUI's memory.

    The weights are ordinary tensors even where ComfyUI loaded them in inference mode, so that a LoRA on them can
    be trained. Raises HollowError for anything but a U-Net of SD1, SD2 or SDXL.
    """
    from diffusers import UNet2DConditionModel

    from ...hollow_core.nets.unet_layers import from_ldm

    config, dtype = unet_config(model), base_dtype(model)
    refuse_injections(model)
    weights = {
        from_ldm(config, key): _ordinary(weight(model, key).to(dtype))
        for key in unet_of(model).state_dict()
        if key.endswith((".weight", ".bias"))  # beside them, quantised layers list their scales and formats
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(weights, assign=True)
    return unet.eval().requires_grad_(False)


def weight(model: ModelPatcher, key: str) -> Tensor:
    """A weight or bias of the MODEL's U-Net as ComfyUI computes with it: scaled, where it is kept quantised, and with
    the graph's patches. `key` is its name in the U-Net's state dict."""
    key = f"{PREFIX}{key}"
    kept, _, convert = comfy.model_patcher.get_key_weight(model.model, key)
    if key in model.backup:  # the MODEL is loaded, and its patches are in the weight already
        kept = model.backup[key].weight
    if key in model.hook_backup:
        kept, _ = model.hook_backup[key]
    if convert is not None:
        kept = convert(kept.to(base_dtype(model)), inplace=False)  # first `to`: fp8 cannot be multiplied
    if key in model.patches:
        kept = comfy.lora.calculate_weight(model.patches[key], kept.to(torch.float32, copy=True), key)
    layer, _, what = key.rpartition(".")
    smoothing = getattr(model.model.get_submodule(layer), "pre_quant_scale", None)  # (in,): of what goes into the layer
    if smoothing is not None and what == "weight":
        kept = kept * smoothing.to(kept)
    return kept


def refuse_injections(model: ModelPatcher) -> None:
    """Raises HollowError where something is put into the MODEL's layers while it samples, which its weights do not
    tell: a LoRA loaded with bypass, or another extension's."""
    if "bypass_lora" in model.injections:
        raise HollowError(
            "A LoRA is loaded into this MODEL with bypass, so that its weights do not hold it. Turn bypass off in its "
            "loader: it then stays in effect while training."
        )
    if model.injections:
        names = ", ".join(model.injections)
        raise HollowError(f"{names} changes this MODEL while it samples, unseen by training. Take that node out.")


def noise_schedule(model: ModelPatcher) -> "NoiseSchedule":
    """On which the MODEL samples: epsilon, v-prediction or sample, zero terminal SNR or not.

    Raises HollowError for a MODEL that samples in another way (EDM, flow, LCM), whether it or a patch does.
    """
    from ...hollow_core.nets.schedule import NoiseSchedule

    sampling = model.get_model_object("model_sampling")
    prediction = _prediction(sampling)
    if prediction is None:
        name = " and ".join(kind.__name__ for kind in type(sampling).__bases__)
        patched = "model_sampling" in model.object_patches
        advice = (
            "Take the sampling patch before it out." if patched else "Load another, such as SD1.5, SD2.1 or SDXL base."
        )
        raise HollowError(
            f"This MODEL samples by {name}, but training knows only noise, velocity and sample prediction at SD's time "
            f"steps. {advice}"
        )
    alphas_cumprod = 1 / (sampling.sigmas.double().cpu() ** 2 + 1)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    betas = (1 - alphas_cumprod / before).float()
    # from the betas and in float32, as a diffusers scheduler has them: stores go by the last digit
    return NoiseSchedule(prediction, torch.cumprod(1 - betas, 0))


def _prediction(sampling: Any) -> "PredictionKind | None":
    """What the network predicts, by what a MODEL's sampling makes of it, whatever its classes are called; None for what
    is none of `PREDICTIONS`, and for other time steps than training's."""
    from ...hollow_core.nets.schedule import PREDICTIONS

    if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
        return None
    sigmas = sampling.sigmas.detach().cpu()
    steps = torch.arange(len(sigmas))
    if not torch.equal(sampling.timestep(sampling.sigmas).cpu().round().long(), steps):
        return None
    generator = torch.Generator().manual_seed(0)
    some = sigmas[steps[:: max(len(steps) // 8, 1)]].view(-1, 1, 1, 1)
    latents, predicted = torch.randn(2, len(some), 1, 2, 2, generator=generator)
    alpha, sigma = 1 / (some**2 + 1) ** 0.5, some / (some**2 + 1) ** 0.5
    flat = some.flatten().to(sampling.sigmas)
    noisy = sampling.calculate_input(flat, latents.to(sampling.sigmas)).cpu()
    denoised = sampling.calculate_denoised(flat, predicted.to(sampling.sigmas), latents.to(sampling.sigmas)).cpu()
    if not torch.allclose(noisy, alpha * latents, rtol=1e-3, atol=1e-4):
        return None
    kinds = PREDICTIONS.values()
    return next(
        (
            each
            for each in kinds
            if torch.allclose(each.clean(alpha * latents, predicted, alpha, sigma), denoised, rtol=1e-3, atol=1e-3)
        ),
        None,
    )


def layout(model: ModelPatcher) -> str:
    """ "sd15", "sd21", "sdxl" or "other", as hollow_core.models.layouts names them."""
    from ...hollow_core.models.layouts import layout_name

    return layout_name(unet_config(model))


def _ordinary(tensor: Tensor) -> Tensor:
    """The same memory as a tensor of its own: to move it leaves ComfyUI's where it is, and autograd may save it, as it
    may not one that was made in inference mode, nor one that was moved outside of it since."""
    with torch.inference_mode(False):
        shared = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return shared.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
