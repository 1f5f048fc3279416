"""Weights that are small or away: exact where promised, as near as promised elsewhere, and really not there."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_training import tiny_examples, tiny_schedule
from torch import nn

from hollow_core.errors import HollowError
from hollow_core.lora.layers import ALL_LAYERS, add_lora, lora_parameters, lora_state
from hollow_core.nets import residency
from hollow_core.nets.residency import away, quantize, stream, stream_middle
from hollow_core.nets.unet import EXIT_ACTIVATION, UNet, head, hollow
from hollow_core.nets.unet_layers import exit_shape
from hollow_core.training.precompute import precompute
from hollow_core.training.settings import DTYPES, TrainSettings
from hollow_core.training.train import train

CUT = 3
FEW = TrainSettings(rank=2, steps=4, learning_rate=1e-3)
TOP = {8: 127, 4: 7}


def linear_and_convolution(unet):
    """{path: weight} of the layers that are to be small or away."""
    kept = ("conv_in", "conv_out", "time_embedding", "add_embedding")
    return {
        path: module.weight.detach().clone()
        for path, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not path.startswith(kept)
    }


def by_hand(layer, shape):
    """The weight that codes and scales stand for, worked out by numpy."""
    codes, scales = layer.codes.numpy(), layer.scales.float().numpy()
    if layer.bits == 4:
        codes = np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.int8) - 8
    return torch.from_numpy((codes * scales).reshape(-1)[: shape.numel()]).reshape(shape)


def put_in(unet, weights):
    """Give the layers of `unet` these weights."""
    for path, weight in weights.items():
        unet.get_submodule(path).weight.data.copy_(weight)
    return unet


def with_lora(unet, targets=ALL_LAYERS):
    """A LoRA on everything that does something."""
    add_lora(unet, 2, targets=targets, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for matrix in lora_parameters(unet):
        matrix.data.normal_(std=0.1, generator=generator)
    return unet


def forward(unet, conditioning, size=8):
    sample = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(2))
    exits = {}
    if getattr(unet, "cut", None) is not None:
        shape = (1, *exit_shape(unet.config, unet.cut, size, size))
        exits["exit_activation"] = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return unet(sample, 500, **conditioning.kwargs(), **exits).sample


def output_and_gradients(unet, conditioning):
    for matrix in lora_parameters(unet):
        matrix.grad = None
    output = forward(unet, conditioning)
    output.square().sum().backward()
    return [output.detach(), *[matrix.grad for matrix in lora_parameters(unet)]]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(24, 16), (320, 320), (24, 16, 3, 3), (7, 5, 1, 1)])
def test_no_weight_is_further_off_than_half_a_step(bits, shape):
    layer = nn.Linear(*shape[:2][::-1], bias=False) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2])
    layer.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    weight = layer.weight.detach().clone()
    unet = nn.Module()
    unet.layer = layer
    quantize(unet, bits, UNet(unet).kept)
    groups = nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    largest = groups.abs().amax(1, keepdim=True).expand_as(groups).flatten()[: weight.numel()].view(shape)
    error = (layer.weight - weight).abs()
    assert (error <= largest / TOP[bits] / 2 + weight.abs() / 256).all()
    assert error.norm() / weight.norm() < {8: 0.01, 4: 0.13}[bits]
    assert layer.weight.dtype == weight.dtype
    assert torch.equal(layer.weight, by_hand(layer, weight.shape))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_of_zeros_stays_zero(bits):
    unet = nn.Module()
    unet.layer = nn.Linear(64, 64)
    nn.init.zeros_(unet.layer.weight)
    quantize(unet, bits, UNet(unet).kept)
    assert not unet.layer.weight.any()


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.02), (4, 0.3)])
def test_the_output_of_the_whole_is_near(tiny_unet, tiny_conditioning, layout, bits, bound):
    unet = tiny_unet(layout)
    conditioning = tiny_conditioning(unet)
    with torch.no_grad():
        exact = forward(unet, conditioning)
        quantize(unet, bits, UNet(unet).kept)
        off = (forward(unet, conditioning) - exact).norm() / exact.norm()
    assert 0 < off < bound


@pytest.mark.parametrize("bits", [8, 4])
def test_the_bytes_are_those_of_the_bits(tiny_unet, layout, bits):
    unet = tiny_unet(layout)
    weights = linear_and_convolution(unet)
    others = sum(parameter.numel() for parameter in unet.parameters()) - sum(w.numel() for w in weights.values())
    quantize(unet, bits, UNet(unet).kept)
    left = sum(parameter.numel() for parameter in unet.parameters())
    assert left == others  # biases, normalisations, first and last layer: as they were
    groups = sum(-(-weight.numel() // 64) for weight in weights.values())
    assert sum(buffer.nbytes for buffer in unet.buffers()) == groups * (64 * bits // 8 + 2)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_are_those_of_the_dequantised_weights(tiny_unet, tiny_conditioning, layout, bits):
    quantized = tiny_unet(layout)
    shapes = {path: weight.shape for path, weight in linear_and_convolution(quantized).items()}
    quantize(quantized, bits, UNet(quantized).kept)
    weights = {path: by_hand(quantized.get_submodule(path), shape) for path, shape in shapes.items()}
    reference = put_in(tiny_unet(layout), weights)
    conditioning = tiny_conditioning(reference)
    for unet in (reference, quantized):
        with_lora(unet)
    for cut in (None, 1):
        expected, found = (
            output_and_gradients(unet if cut is None else hollow(unet, cut), conditioning)
            for unet in (reference, quantized)
        )
        for tensor, other in zip(expected, found, strict=True):
            assert torch.equal(tensor, other)


@pytest.mark.parametrize("streamed", [False, True])
def test_no_weight_is_alive_between_forward_and_backward(tiny_unet, tiny_conditioning, monkeypatch, streamed):
    unet = tiny_unet("sd21")
    quantize(unet, 8, UNet(unet).kept)
    if streamed:
        stream(unet, "cpu", UNet(unet).kept)
    with_lora(unet)
    seen = []
    fetch = residency._FrozenLayer.fetch

    def watched(layer, dtype):
        weight = fetch(layer, dtype)
        seen.append(weakref.ref(weight.untyped_storage()))
        return weight

    monkeypatch.setattr(residency._FrozenLayer, "fetch", watched)
    output = forward(unet, tiny_conditioning(unet))
    forward_calls = len(seen)
    assert forward_calls == len(linear_and_convolution_paths(unet))
    assert [reference for reference in seen if reference() is not None] == []
    output.square().sum().backward()
    assert len(seen) > 1.5 * forward_calls
    assert [reference for reference in seen if reference() is not None] == []


def linear_and_convolution_paths(unet):
    return [path for path, module in unet.named_modules() if isinstance(module, residency._FrozenLayer)]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "bits"), [("sd15", 4), ("sd21", None), ("sdxl", 8)])
def test_streaming_changes_not_a_bit(tiny_unet, tiny_conditioning, layout, bits):
    resident, streamed = tiny_unet(layout), tiny_unet(layout)
    for unet in (resident, streamed):
        if bits is not None:
            quantize(unet, bits, UNet(unet).kept)
    stream(streamed, "cpu", UNet(streamed).kept)
    assert resident.state_dict().keys() == streamed.state_dict().keys()
    conditioning = tiny_conditioning(resident)
    for unet in (resident, streamed):
        with_lora(unet)
    # the order of use changes, and then what was sent for ahead is the wrong one
    for cut, checkpointing in [(None, False), (1, False), (1, True)]:
        plain, other = (unet if cut is None else hollow(unet, cut) for unet in (resident, streamed))
        if checkpointing:
            other.enable_gradient_checkpointing()
            other.train()
        expected, found = output_and_gradients(plain, conditioning), output_and_gradients(other, conditioning)
        assert all(torch.equal(tensor, same) for tensor, same in zip(expected, found, strict=True))


@pytest.mark.slow
def test_streaming_changes_not_a_bit_before_anything_is_frozen(tiny_unet, tiny_conditioning):
    """Parameters that still ask for gradients: torch multiplies a batch by them in another way."""
    resident, streamed = tiny_unet("sd21"), tiny_unet("sd21")
    stream(streamed, "cpu", UNet(streamed).kept)
    sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    arguments = (sample, 5, tiny_conditioning(resident, batch=2, tokens=77).encoder_hidden_states)
    with torch.no_grad():
        assert torch.equal(resident(*arguments).sample, streamed(*arguments).sample)


def test_two_weights_are_on_the_device_at_once_and_each_comes_one_ahead(tiny_unet, tiny_conditioning, monkeypatch):
    unet = tiny_unet("sd21")
    stream(unet, "cpu", UNet(unet).kept)
    with_lora(unet)
    copies, at_once = [], []

    class Watched(residency._Copy):
        def __init__(self, tensors, *where):
            super().__init__(tensors, *where)
            copies.append([weakref.ref(tensor) for tensor in self.tensors])
            at_once.append(sum(any(tensor() is not None for tensor in copy) for copy in copies))

    monkeypatch.setattr(residency, "_Copy", Watched)
    asked = []
    visit = residency.Streamer.visit
    monkeypatch.setattr(residency.Streamer, "visit", lambda *given: asked.append(given) or visit(*given))
    for _ in range(3):
        before, asked_before = len(copies), len(asked)
        output_and_gradients(unet, tiny_conditioning(unet))
    assert max(at_once) == 2
    # nothing that was sent for came in vain; where forward turns into backward, one copy serves twice
    assert len(copies) - before == len(asked) - asked_before - 1


def test_on_two_paths_nothing_is_sent_for_in_vain(tiny_unet, tiny_conditioning, monkeypatch):
    """Base path and personal path take turns, through views that pass other layers."""
    unet = tiny_unet("sd21")
    stream(unet, "cpu", UNet(unet).kept)
    paths = [head(unet, 1), hollow(unet, 1, None)]
    conditioning = tiny_conditioning(unet)
    copies, asked = [], []
    visit, make = residency.Streamer.visit, residency._Copy.__init__
    monkeypatch.setattr(residency._Copy, "__init__", lambda *given: copies.append(given) or make(*given))
    monkeypatch.setattr(residency.Streamer, "visit", lambda *given: asked.append(given) or visit(*given))
    for _ in range(2):
        copies.clear()
        asked.clear()
        with torch.no_grad():
            sample = torch.zeros(1, 4, 16, 16)
            exit_activation = paths[0](sample, 5, conditioning.encoder_hidden_states).sample
            paths[1](sample, 5, conditioning.encoder_hidden_states, exit_activation=exit_activation)
    assert len(copies) == len(asked) > len(away(unet))  # some layers are on both paths


def test_what_is_streamed_stays_in_main_memory_and_the_rest_goes(tiny_unet):
    unet = tiny_unet("sd21")
    weights = linear_and_convolution(unet)
    stream(unet, "meta", UNet(unet).kept)  # any device that is not main memory
    unet.to("meta")
    assert {str(tensor.device) for tensor in away(unet)} == {"cpu"}
    assert sum(tensor.nbytes for tensor in away(unet)) == sum(weight.nbytes for weight in weights.values())
    there = sum(p.nbytes for p in unet.parameters() if p.device.type == "meta")
    assert there + sum(tensor.nbytes for tensor in away(unet)) == sum(p.nbytes for p in unet.parameters())
    assert unet.device.type == "meta"
    add_lora(unet, 2, generator=torch.Generator().manual_seed(0))
    assert {matrix.device.type for matrix in lora_parameters(unet)} == {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_streamed_run_is_the_resident_one_bit_by_bit(tiny_unet, tmp_path, bits, precision):
    def run(name, streamed):
        unet, schedule = tiny_unet("sd21").to(DTYPES[precision]), tiny_schedule()
        if bits is not None:
            quantize(unet, bits, UNet(unet).kept)
        if streamed:
            stream(unet, "cpu", UNet(unet).kept)
        store = precompute(UNet(unet), schedule, tiny_examples(unet), tmp_path / "store", cut=CUT, samples=4)
        assert lora_state(head(unet, CUT)) == {}
        settings = replace(FEW, precision=precision)
        return train(UNet(unet).hollow(CUT, range(1000)), schedule, store, settings, folder=tmp_path / name)

    resident, streamed = run("resident", False), run("streamed", True)  # on the same store: it fits both
    assert streamed.losses == resident.losses
    assert all(torch.equal(streamed.state[key], tensor) for key, tensor in resident.state.items())


def test_a_streamed_middle_changes_no_record_and_leaves_with_the_middle(tiny_unet, tmp_path):
    schedule, records = tiny_schedule(), {}
    for name in ("resident", "visiting"):
        unet = tiny_unet("sd21")
        if name == "visiting":
            stream_middle(UNet(unet), CUT, "cpu")
            middle = sum(tensor.numel() for tensor in away(unet))
            assert middle == sum(module.weight.numel() for module in _middle(unet))
            assert away(hollow(unet, CUT)) == []
        store = precompute(UNet(unet), schedule, tiny_examples(unet), tmp_path / name, cut=CUT, samples=4)
        records[name] = [store.record(index).stored[EXIT_ACTIVATION] for index in range(4)]
    assert all(map(torch.equal, records["resident"], records["visiting"]))


def _middle(unet):
    """The linear and convolution layers that are in the whole U-Net and not in the hollowed."""
    remaining = set(hollow(unet, CUT).modules())
    kept = {unet.time_embedding.linear_1, unet.time_embedding.linear_2}
    layers = [module for module in unet.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return [layer for layer in layers if layer not in remaining and layer not in kept]


def test_a_store_of_another_precision_is_refused(tiny_unet, tmp_path):
    unet, schedule = tiny_unet("sd15"), tiny_schedule()
    precompute(UNet(unet), schedule, tiny_examples(unet), tmp_path, cut=CUT, samples=4)
    quantize(unet, 8, UNet(unet).kept)
    with pytest.raises(HollowError, match=r"made from something else: model \(.*another precision\)"):
        precompute(UNet(unet), schedule, tiny_examples(unet), tmp_path, cut=CUT, samples=4)


def test_what_cannot_be_is_refused_in_a_sentence(tiny_unet):
    unet = tiny_unet("sd15")
    with pytest.raises(HollowError, match=r"cannot be kept in 3 bits\. Choose 8 or 4"):
        quantize(unet, 3)
    quantize(unet, 8, UNet(unet).kept)
    with pytest.raises(HollowError, match="quantised already"):
        quantize(unet, 4, UNet(unet).kept)
    stream(unet, "cpu", UNet(unet).kept)
    with pytest.raises(HollowError, match="streamed already"):
        stream(unet, "cpu", UNet(unet).kept)
    for lever in (lambda unet: quantize(unet, 8), lambda unet: stream(unet, "cpu")):
        with pytest.raises(HollowError, match="carries a LoRA already"):
            lever(with_lora(tiny_unet("sd15")))
