"""Checkpoints whose weights are kept quantised: trained on, analyzed and sampled as ComfyUI computes with them."""

from typing import Any

import pytest
import torch

pytest.importorskip("comfy", reason="COMFYUI_DIR names no checkout of ComfyUI")

import comfy.model_management
from hollow_pack.nodes.host.analysis import base_weights
from hollow_pack.nodes.host.memory import clear_device
from hollow_pack.nodes.host.unet import diffusers_unet
from quantised_models import FORMATS, quantised_model
from tiny_models import SIZE, TOKEN_WIDTH
from torch import Tensor

from hollow_core.nets.unet_layers import to_ldm


@pytest.mark.parametrize("name", FORMATS)
def test_the_weights_that_are_trained_on_are_those_that_are_meant(name: str) -> None:
    model, meant = quantised_model("sd15", name)
    unet = diffusers_unet(model)
    ours = {to_ldm(unet.config, key): weight for key, weight in unet.state_dict().items()}
    assert ours.keys() == meant.keys()
    for key, weight in meant.items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-6, atol=1e-7)
    look = base_weights(model)
    torch.testing.assert_close(
        look("mid_block.attentions.0.transformer_blocks.0.attn1.to_q"),
        meant["middle_block.1.transformer_blocks.0.attn1.to_q.weight"],
    )


@pytest.mark.parametrize("name", FORMATS)
@torch.inference_mode()
def test_it_predicts_what_comfyui_predicts(name: str) -> None:
    model, _ = quantised_model("sd15", name)
    generator = torch.Generator().manual_seed(0)
    latents, context = (
        torch.randn(1, 4, SIZE, SIZE, generator=generator),
        torch.randn(1, 5, TOKEN_WIDTH, generator=generator),
    )
    timestep = torch.tensor([500])
    comfy.model_management.load_models_gpu([model])
    theirs = model.model.diffusion_model(latents, timestep, context)
    ours = diffusers_unet(model)(latents, timestep, context).sample
    assert relative(ours, theirs) < 0.05  # ComfyUI rounds activations, too
    patched = model.clone()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    shape = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_q.weight.shape
    added = torch.randn(shape, generator=generator)
    patched.add_patches({key: ("diff", (added,))}, 0.5)
    ours = diffusers_unet(patched).mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    before = diffusers_unet(model).mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    torch.testing.assert_close(ours - before, 0.5 * added, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_it_leaves_the_device_for_training(name: str) -> None:
    """Loaded in inference mode, as nodes run, and unloaded where there is training."""
    with torch.inference_mode():
        model, _ = quantised_model("sd15", name)
        comfy.model_management.load_models_gpu([model])
    clear_device(model)
    assert comfy.model_management.current_loaded_models == []
    assert diffusers_unet(model).conv_in.weight.requires_grad is False


@pytest.mark.skipif("int8_tensorwise" not in FORMATS, reason="This ComfyUI smooths no inputs")
def test_inputs_that_a_layer_smooths_count_as_its_weights() -> None:
    """AWQ: the layer scales what goes in, and its weights are made for that."""
    model, meant = quantised_model("sd15", "int8_tensorwise")
    layer = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_q
    x, scale = (torch.rand(layer.weight.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    layer.pre_quant_scale = scale
    with torch.inference_mode():
        theirs = layer(x[None])[0]
    ours = diffusers_unet(model).mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight @ x
    assert relative(ours, theirs) < 0.02  # ComfyUI rounds what goes in, too
    plain = meant["middle_block.1.transformer_blocks.0.attn1.to_q.weight"] @ x
    assert relative(ours, plain) > 0.2


def relative(ours: Tensor, theirs: Any) -> float:
    return float((ours - theirs).norm() / theirs.norm())
