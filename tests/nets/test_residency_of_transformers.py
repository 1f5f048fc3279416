"""Transformers whose weights are small or away: exact where promised, near elsewhere, and only in the blocks."""

from collections.abc import Callable, Mapping

import pytest
import torch
from tiny_transformers import FAMILY_NAMES, tiny_latents, tiny_prompt, tiny_transformer
from torch import Tensor, nn

from hollow_core.lora.layers import add_lora, lora_parameters
from hollow_core.nets.network import Stored
from hollow_core.nets.residency import Bits, away, quantize, stream, stream_middle
from hollow_core.nets.transformer import Transformer

FEW = ["flux", "z-image", "anima"]
CUT = (1, 1)
T = [700]

Lever = Callable[[Transformer], object]


def quantized(bits: Bits) -> Lever:
    return lambda network: quantize(network.module, bits, network.kept)


def streamed(network: Transformer) -> None:
    stream(network.module, "cpu", network.kept)


def with_lora(network: Transformer) -> list[nn.Parameter]:
    """Its matrices, which do something."""
    add_lora(network.module, 2, within=network.within, generator=torch.Generator().manual_seed(0))
    matrices = lora_parameters(network.module)
    generator = torch.Generator().manual_seed(1)
    for matrix in matrices:
        matrix.data.normal_(std=0.1, generator=generator)
    return matrices


def output_and_gradients(network: Transformer, stored: Stored, matrices: list[nn.Parameter]) -> list[Tensor]:
    for matrix in matrices:
        matrix.grad = None
    out = network.predict(tiny_latents(network), T, tiny_prompt(network), stored)
    out.square().sum().backward()
    return [out.detach(), *(matrix.grad for matrix in matrices if matrix.grad is not None)]


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("bits", [None, 8])
def test_streamed_is_resident_to_the_bit(name: str, bits: Bits | None) -> None:
    """Base path and hollowed, forward and backward, and where blocks compute twice."""
    found: list[list[Tensor]] = []
    for levers in ([], [streamed]):
        network = tiny_transformer(name)
        for lever in [*([] if bits is None else [quantized(bits)]), *levers]:
            lever(network)
        stored = network.base(CUT)(tiny_latents(network), T, tiny_prompt(network))
        hollowed = network.hollow(CUT, T)
        matrices = with_lora(hollowed)
        results = [*stored.values(), *output_and_gradients(hollowed, stored, matrices)]
        for levels in (1, None):
            hollowed.checkpoint(levels)
            results += output_and_gradients(hollowed, stored, matrices)
        found.append(results)
    assert len(found[0]) > 10
    assert all(torch.equal(resident, away) for resident, away in zip(*found, strict=True))


@pytest.mark.parametrize(("bits", "top"), [(8, 127), (4, 7)])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_weights_of_blocks_are_within_half_a_scale_and_all_else_as_it_was(name: str, bits: Bits, top: int) -> None:
    network = tiny_transformer(name)
    before = {path: parameter.detach().clone() for path, parameter in network.module.named_parameters()}
    quantized(bits)(network)
    as_it_was = dict(network.module.named_parameters())
    small = before.keys() - as_it_was.keys()
    assert small
    assert not [path for path in small if path.startswith(network.kept)]
    assert all(torch.equal(before[path], parameter) for path, parameter in as_it_was.items())
    for path in small:
        weight = before[path]
        groups = nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
        largest = groups.abs().amax(1, keepdim=True).expand_as(groups).flatten()[: weight.numel()].view(weight.shape)
        layer = network.module.get_submodule(path.removesuffix(".weight"))
        assert ((layer.weight - weight).abs() <= largest / top / 2 + weight.abs() / 256).all()


@pytest.mark.parametrize("name", FEW)
def test_a_lora_learns_on_a_small_base_that_is_away(name: str) -> None:
    network = tiny_transformer(name)
    quantized(4)(network)
    streamed(network)
    stored = network.base(CUT)(tiny_latents(network), T, tiny_prompt(network))
    hollowed = network.hollow(CUT, T)
    matrices = with_lora(hollowed)
    optimizer = torch.optim.SGD(matrices, lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = hollowed.predict(tiny_latents(hollowed), T, tiny_prompt(hollowed), stored).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", FEW)
def test_what_is_streamed_stays_in_main_memory_and_leaves_with_its_block(name: str) -> None:
    network = tiny_transformer(name)
    stream(network.module, "meta", network.kept)  # any device that is not main memory
    network.module.to("meta")
    assert {tensor.device.type for tensor in away(network.module)} == {"cpu"}
    there = [path for path, parameter in network.module.named_parameters() if parameter.device.type == "meta"]
    assert [path for path in there if path.startswith(network.kept)]
    assert not [
        path for path in there if path.startswith(network.within) and network.module.get_parameter(path).dim() == 2
    ]
    hollowed = network.hollow(CUT, T)
    assert bytes_of(away(hollowed.module)) < bytes_of(away(network.module))


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("cut", [(1, 1), (2, 0), (0, 2)])
def test_both_ends_visit_while_precomputing_and_no_record_changes(name: str, cut: tuple[int, int]) -> None:
    records: list[Mapping[str, Tensor]] = []
    for visiting in (False, True):
        network = tiny_transformer(name)
        if visiting:
            stream_middle(network, cut, "cpu")
            gone = sum(
                each.weight.numel()
                for path in network.removed(cut)
                for each in network.module.get_submodule(path).modules()
                if isinstance(each, nn.Linear)
            )
            assert sum(tensor.numel() for tensor in away(network.module)) == gone > 0
            assert away(network.hollow(cut, T).module) == []
        records.append(network.base(cut)(tiny_latents(network), T, tiny_prompt(network)))
    assert records[0].keys() == records[1].keys()
    assert all(torch.equal(records[0][key], records[1][key]) for key in records[0])
