"""The blocks' names in the vocabularies of other tools, strings of weights, and LoRAs scaled by them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hollow_core.analysis.block_weights import (
    block_weights,
    factor_of,
    parse_block_weights,
    scale,
    scale_file,
    slot,
    slots,
)
from hollow_core.errors import HollowError
from hollow_core.lora.delta import LoraLayer
from hollow_core.lora.dialects import Lora
from hollow_core.lora.file import read, write_dialect
from hollow_core.models.layouts import layout_config
from hollow_core.nets.unet_layers import layers

SD = layout_config("sd15")
QUERY = "transformer_blocks.0.attn1.to_q"


def test_slots_are_those_that_users_know(layout: str) -> None:
    """As sd-webui-lora-block-weight lists them behind BASE."""
    config = layout_config(layout)
    if layout == "sdxl":
        known = ["IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{number:02}" for number in range(6))]
        count = 9
    else:
        known = [f"IN{number:02}" for number in (1, 2, 4, 5, 7, 8)]
        known += ["MID", *(f"OUT{number:02}" for number in range(3, 12))]
        count = 12
    assert slots(config) == known
    every = [*(f"IN{n:02}" for n in range(count)), "MID", *(f"OUT{n:02}" for n in range(count))]
    assert slots(config, all_blocks=True) == every


@pytest.mark.parametrize(
    ("layout", "name", "expected", "module"),
    [
        ("sd15", "3-2", "IN08", "down_blocks.2.attentions.1"),
        ("sd15", "5-1", "MID", "mid_block.attentions.0"),
        ("sd15", "6-4", "OUT02", "up_blocks.0.upsamplers.0"),
        ("sd15", "7-1", "OUT03", "up_blocks.1.attentions.0"),
        ("sd15", "9-3", "OUT11", "up_blocks.3.attentions.2"),
        ("sd21", "2-1", "IN04", "down_blocks.1.attentions.0"),
        ("sdxl", "3-2", "IN08", "down_blocks.2.attentions.1"),
        ("sdxl", "5-1", "OUT00", "up_blocks.0.attentions.0"),
        ("sdxl", "6-3", "OUT05", "up_blocks.1.attentions.2"),
    ],
)
def test_one_block_in_three_vocabularies(layout: str, name: str, expected: str, module: str) -> None:
    layer = next(layer for layer in layers(layout_config(layout)) if layer.name == name)
    assert (slot(layer), layer.modules[-1]) == (expected, module)


def test_a_string_says_what_it_was_made_of() -> None:
    text = block_weights(SD, {"IN08": 0.5, "MID": 0.0})
    assert text == "1,1,1,1,1,1,0.5,0,1,1,1,1,1,1,1,1,1"
    factors = parse_block_weights(text, SD)
    assert factor_of(f"down_blocks.2.attentions.1.{QUERY}", factors) == 0.5
    assert factor_of(f"mid_block.attentions.0.{QUERY}", factors) == 0
    assert factor_of("down_blocks.2.downsamplers.0.conv", factors) == 1
    assert block_weights(layout_config("sdxl"), {}).count(",") == 11
    text_only = parse_block_weights(block_weights(SD, {"BASE": 0.25}), SD)
    assert factor_of("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", text_only) == 0.25


@pytest.mark.parametrize(
    "text", ["IN08=0.5", "in8 = .5", "3-2=0.5", "down_blocks.2.attentions.1=0.5", "down_blocks.2=0,IN08=.5"]
)
def test_blocks_have_names_in_every_vocabulary(text: str) -> None:
    assert factor_of(f"down_blocks.2.attentions.1.{QUERY}", parse_block_weights(text, SD)) == 0.5


def test_of_two_names_for_one_module_the_later_holds() -> None:
    factors = parse_block_weights("IN08=0.5, down_blocks.2=0, IN08=2", SD)
    assert factor_of(f"down_blocks.2.attentions.1.{QUERY}", factors) == 2
    assert factor_of(f"down_blocks.2.attentions.0.{QUERY}", factors) == 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1,0,1", "are no block weights for this U-Net. Write 17 or 26 numbers"),
        ("", "are no block weights"),
        ("IN12=1", "has no block 'IN12'. Name it as IN08, 3-2 or down_blocks.2.attentions.1."),
        ("IN08=half", "'half' is no number to multiply a block by"),
        ("IN08=inf", "'inf' is no number"),
        ("IN08=0.5,1", "are no block weights"),
    ],
)
def test_what_cannot_be_meant_is_said(text: str, sentence: str) -> None:
    with pytest.raises(HollowError, match=sentence):
        parse_block_weights(text, SD)


def random_lora(config_name: str, dora: bool = False) -> dict[str, LoraLayer]:
    generator = torch.Generator().manual_seed(0)
    width = {"sd15": 768, "sdxl": 2048}[config_name]

    def layer(into: int) -> LoraLayer:
        matrices = torch.randn(4, into, generator=generator), torch.randn(1280, 4, generator=generator)
        return LoraLayer(*matrices, 2.0, torch.ones(1280) if dora else None)

    block = "transformer_blocks.0.attn2"
    names = ("down_blocks.2.attentions.1", "mid_block.attentions.0", "up_blocks.0.attentions.1")
    if config_name == "sd15":
        names = (*names[:2], "up_blocks.1.attentions.0")
    return {f"{name}.{block}.to_k": layer(width) for name in names}


@pytest.mark.parametrize(
    ("family", "dialect"), [("sd15", "kohya"), ("sdxl", "kohya"), ("sd15", "diffusers"), ("sdxl", "comfy")]
)
def test_a_scaled_file_changes_so_much_less(family: str, dialect: str, tmp_path: Path) -> None:
    config, lora = layout_config(family), random_lora(family)
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    write_dialect(
        source,
        Lora(dialect, lora, {}, ()),
        config,
        {"modelspec.author": "mine"},
        dialect=dialect,
    )
    written = scale_file(source, target, "IN08=0.5,MID=0")
    assert written.layers == 3
    again, metadata = read(target)
    assert again.dialect == dialect
    assert again.layers.keys() == lora.keys()
    for (module, layer), factor in zip(lora.items(), (0.5, 0.0, 1.0), strict=True):
        change = again.layers[module].scale * again.layers[module].up @ again.layers[module].down
        assert torch.allclose(change, factor * layer.scale * layer.up @ layer.down, atol=2e-2, rtol=2e-3)
    assert metadata["modelspec.author"] == "mine"


@pytest.mark.parametrize(
    ("part", "value", "sentence"),
    [
        ("lora_down.weight", float("inf"), "holds infinite or undefined values in mid_block"),
        ("alpha", float("inf"), "holds infinite or undefined values in mid_block"),
        ("alpha", float("nan"), "holds infinite or undefined values in mid_block"),
        ("alpha", 0.0, ""),  # which stands for the rank
        ("alpha", 1e-45, ""),
        ("lora_up.weight", 1e-45, ""),
    ],
)
def test_sizes_that_are_none_are_refused_or_scaled(part: str, value: float, sentence: str, tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_dialect(source, Lora("kohya", random_lora("sd15"), {}, ()), SD, {})
    tensors = load_file(source)
    key = next(key for key in sorted(tensors) if key.startswith("lora_unet_mid") and key.endswith(part))
    tensors[key] = torch.full(tensors[key].shape, value, dtype=torch.float32)
    save_file(tensors, source)
    if sentence:
        with pytest.raises(HollowError, match=sentence):
            scale_file(source, target, "IN08=0.5")
        assert not target.exists()
    else:
        assert scale_file(source, target, "IN08=0.5", dtype=torch.float32).layers == 3


def test_sizes_far_apart_do_not_divide_by_zero(tmp_path: Path) -> None:
    """Of alphas such as peft's config may name."""
    layers = {
        name: LoraLayer(torch.full((1, 768), 3e38), torch.full((1280, 1), 2e-45), alpha)
        for name, alpha in zip(random_lora("sd15"), (1e-300, 1.0, 1.0), strict=True)
    }
    lora = Lora("kohya", layers, {}, ())
    assert write_dialect(tmp_path / "a.safetensors", lora, SD, {}, dtype=torch.float32).layers == 3


def test_a_dora_is_not_scaled() -> None:
    lora = random_lora("sd15", dora=True)
    assert scale(lora, {"up_blocks.3": 0.5}) == lora
    with pytest.raises(HollowError, match="is a DoRA, whose change is not scaled by a number"):
        scale(lora, {"mid_block": 0.5})
