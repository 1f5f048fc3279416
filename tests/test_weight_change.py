"""What a LoRA changed: the figure against merged weights, and the cut that it suggests."""

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from hollow_core import lora_file
from hollow_core.errors import HollowError
from hollow_core.hollow import hollow
from hollow_core.lora import add_lora, lora_parameters, lora_state
from hollow_core.weight_change import chart, suggested_cut, weight_changes

TinyUNet = Callable[..., UNet2DConditionModel]
TARGETS = ("to_q", "to_out.0", "conv1", "downsamplers.0.conv")


def trained(unet: UNet2DConditionModel, layout: str, inside: float = 1.0, cut: int = 3) -> dict[str, Tensor]:
    """A LoRA on all of `unet`, its changes inside the hollow of `cut` scaled by `inside`; as a file holds it."""
    generator = torch.Generator().manual_seed(1)
    add_lora(unet, 2, alpha=4, targets=TARGETS, generator=generator)
    for matrix in lora_parameters(unet):
        matrix.data = torch.randn(matrix.shape, generator=generator)
    outside = set(lora_state(hollow(unet, cut)))
    state = {key: matrix * (1 if key in outside else inside) for key, matrix in lora_state(unet).items()}
    return lora_file.to_kohya(state, unet.config, alpha=4, layout=layout)


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_the_change_is_that_of_the_merged_weights(layout: str, tiny_unet: TinyUNet) -> None:
    unet = tiny_unet(layout)
    changes = {change.module: change for change in weight_changes(trained(unet, layout), unet.config)}
    layer = unet.down_blocks[1].resnets[0].conv1
    attention = unet.down_blocks[1].attentions[0].transformer_blocks
    merged = [layer, *(block.attn1.to_q for block in attention), *(block.attn1.to_out[0] for block in attention)]
    merged += [block.attn2.to_q for block in attention] + [block.attn2.to_out[0] for block in attention]
    differences = torch.cat([module.get_delta_weight("hollow").flatten() for module in merged])
    assert changes["down_blocks.1.resnets.0"].mean == pytest.approx(differences.abs().mean().item(), rel=2e-3)


def test_untrained_layers_have_no_figure(tiny_unet: TinyUNet) -> None:
    unet = hollow(tiny_unet("sd15"), 3)
    add_lora(unet, 2, targets=TARGETS, generator=torch.Generator())
    state = lora_file.to_kohya(lora_state(unet), unet.config, alpha=2, layout="sd15")
    changes = {change.layer: change.mean for change in weight_changes(state, unet.config)}
    assert changes["5-1"] is None
    assert changes["4-1"] is None
    assert changes["9-1"] == 0  # trained, though nothing was learned yet
    assert chart(weight_changes(state, unet.config)).width > 100


def test_the_suggested_cut_leaves_out_little(tiny_unet: TinyUNet) -> None:
    unet = tiny_unet("sd15")
    small_inside = weight_changes(trained(unet, "sd15", inside=0.01, cut=4), unet.config)
    assert suggested_cut(small_inside, unet.config) == 4
    alike = weight_changes(trained(tiny_unet("sd15"), "sd15"), unet.config)
    assert suggested_cut(alike, unet.config) == 0


def test_another_models_lora_is_refused(tiny_unet: TinyUNet) -> None:
    state = {"lora_unet_somewhere.lora_down.weight": torch.zeros(1, 2)}
    with pytest.raises(HollowError, match="changes no layer of this U-Net"):
        weight_changes(state, tiny_unet("sd15").config)


def test_the_layout_is_read_off_the_metadata() -> None:
    assert lora_file.layout_of({"ss_base_model_version": "sd_v2"}) == "sd21"
    with pytest.raises(HollowError, match="base model is not named"):
        lora_file.layout_of({})
