"""The map of a U-Net against the paper's figures and diffusers' own converter for original checkpoints."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from hollow_core.errors import HollowError
from hollow_core.models.layouts import layout_config
from hollow_core.nets.network import removed_fraction
from hollow_core.nets.unet import UNet
from hollow_core.nets.unet_layers import (
    exit_shape,
    from_ldm,
    hollowed_layers,
    layers,
    max_cut,
    to_ldm,
)


def unet_without_data(layout):
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(layout_config(layout))


def test_removed_percentages_of_the_paper():
    unet = unet_without_data("sd21")
    counted = [100 * removed_fraction(UNet(unet), cut) for cut in range(7)]
    assert counted == pytest.approx([11.52, 20.79, 30.07, 39.15, 56.60, 73.30, 84.25], abs=0.006)
    assert counted == pytest.approx([11.5, 20.8, 30.1, 39.2, 56.6, 73.3, 84.3], abs=0.1)  # as printed


def test_sdxl_without_its_mid_block_loses_the_410_million_of_the_paper():
    unet = unet_without_data("sdxl")
    assert [layer.name for layer in hollowed_layers(unet.config, 0)] == ["4-1", "4-2"]
    mid = sum(parameter.numel() for parameter in unet.mid_block.parameters())
    mlp = sum(parameter.numel() for parameter in unet.time_embedding.parameters())
    assert mid == 413_117_440  # the paper's "entire mid_block layers (410M)": both ResNets and the attention
    assert removed_fraction(UNet(unet), 0) * sum(p.numel() for p in unet.parameters()) == pytest.approx(mid + mlp)


@pytest.mark.parametrize(
    ("cut", "first", "last", "shape"),
    [
        (0, "5-1", "5-2", (1280, 8, 8)),
        (1, "4-2", "6-1", (1280, 8, 8)),
        (2, "4-1", "6-2", (1280, 8, 8)),
        (3, "3-3", "6-4", (1280, 16, 16)),
        (4, "3-2", "7-1", (1280, 16, 16)),
        (5, "3-1", "7-2", (1280, 16, 16)),
        (6, "2-3", "7-4", (1280, 32, 32)),
        (11, "1-1", "9-2", (320, 64, 64)),
    ],
)
def test_blocks_and_exits_of_the_paper(cut, first, last, shape):
    config = layout_config("sd21")
    names = [layer.name for layer in layers(config)]
    hollowed = [layer.name for layer in hollowed_layers(config, cut)]
    assert hollowed == names[names.index(first) : names.index(last) + 1]
    assert exit_shape(config, cut, 64, 64) == shape


def test_layers_are_the_modules_of_the_unet(layout):
    unet = unet_without_data(layout)
    paths = [path for layer in layers(unet.config) for path in layer.modules]
    prefixes = tuple(f"{path}." for path in paths)
    outside = ("conv_in.", "time_embedding.", "add_embedding.", "conv_norm_out.", "conv_out.")
    for name, _ in unet.named_parameters():
        assert name.startswith(prefixes) != name.startswith(outside)
    for path in paths:
        unet.get_submodule(path)


def test_ldm_names_both_ways(layout):
    unet = unet_without_data(layout)
    names = [name for name, _ in unet.named_parameters()]
    renamed = [to_ldm(unet.config, name) for name in names]
    assert [from_ldm(unet.config, name) for name in renamed] == names
    checkpoint = {f"model.diffusion_model.{ldm}": name for ldm, name in zip(renamed, names, strict=True)}
    converted = convert_ldm_unet_checkpoint(checkpoint, unet.config)
    assert converted == {name: name for name in names}


def test_module_names_in_ldm():
    config = layout_config("sdxl")
    to_q = "up_blocks.0.attentions.1.transformer_blocks.9.attn2.to_q"
    assert to_ldm(config, to_q) == "output_blocks.1.1.transformer_blocks.9.attn2.to_q"
    assert to_ldm(config, "down_blocks.1.resnets.0.conv_shortcut") == "input_blocks.4.0.skip_connection"
    with pytest.raises(HollowError, match=r"has no layer 'double_blocks\.0\.img_attn'"):
        to_ldm(config, "double_blocks.0.img_attn")


@pytest.mark.parametrize("cut", [-1, 9])
def test_cuts_out_of_range_are_refused(cut):
    assert max_cut(layout_config("sdxl")) == 8
    with pytest.raises(HollowError, match=rf"no cut {cut}. Choose a cut from 0 to 8"):
        hollowed_layers(layout_config("sdxl"), cut)


def test_unknown_blocks_and_layouts_are_refused():
    config = layout_config("sd15") | {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}
    with pytest.raises(HollowError, match="cannot cut a U-Net with a UNetMidBlock2DSimpleCrossAttn"):
        layers(config)
    with pytest.raises(HollowError, match=r"no layout named 'sd3'. Choose one of sd15, sd21, sdxl"):
        layout_config("sd3")
