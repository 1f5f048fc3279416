"""The table of cuts against the figures counted from the paper."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hollow_core.lora.layers import add_lora, lora_parameters
from hollow_core.memory.cost import PAPER_RANK, cuts_table
from hollow_core.models.base_model import outline
from hollow_core.nets.unet import UNet, head, hollow
from hollow_core.nets.unet_layers import max_cut


@pytest.mark.slow
def test_sd21_against_the_paper():
    table = cuts_table(outline("sd21").network, 64, 64)
    assert [row["k"] for row in table] == list(range(12))
    row = table[3]
    assert row["blocks"] == ["3-3", "4-1", "4-2", "5-1", "5-2", "6-1", "6-2", "6-3", "6-4"]
    assert row["removed_percent"] == 39.15
    assert row["parameters"] == pytest.approx(527e6, abs=0.5e6)
    assert row["exit_shape"] == [1280, 16, 16]
    assert 2 * row["record_bytes"] == pytest.approx(1.31e6, rel=0.01)  # the paper stores fp32
    assert {name: round(count / 1e12, 3) for name, count in row["flops"].items()} == {
        "full": 0.804,
        "precompute": 0.288,
        "hollowed_forward": 0.757,
        "training_step": 1.725,
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_operations_are_those_that_really_run(tiny_unet, tiny_conditioning, layout):
    """At every cut, with attention left before the exit, behind it, and nowhere."""
    unet = tiny_unet(layout, layers_per_block=1, transformer_layers_per_block=1, sample_size=8).to("meta")
    table = json.loads(json.dumps(cuts_table(UNet(unet), 8, 8)))
    assert len(table) == max_cut(unet.config) + 1
    assert not lora_parameters(unet)
    sample = torch.empty(1, 4, 8, 8, device="meta")
    prompt = tiny_conditioning(unet, tokens=77).to("meta").kwargs()
    for row in table:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            activation = head(unet, row["k"])(sample, 0, **prompt).sample
        assert row["flops"]["precompute"] == counter.get_total_flops()
        assert row["exit_shape"] == list(activation.shape[1:])
        hollowed = hollow(unet, row["k"])
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            hollowed(sample, 0, exit_activation=activation, **prompt)
        assert row["flops"]["hollowed_forward"] == counter.get_total_flops()
        assert row["parameters"] == hollowed.num_parameters()
    add_lora(unet, PAPER_RANK, generator=torch.Generator())
    for row in table:
        activation, hollowed = torch.empty(1, *row["exit_shape"], device="meta"), hollow(unet, row["k"], [0])
        with FlopCounterMode(display=False) as counter:
            predicted = hollowed(sample, 0, exit_activation=activation, **prompt).sample
            if predicted.requires_grad:
                predicted.sum().backward()
        assert row["flops"]["training_step"] == counter.get_total_flops()
