"""Hollowed transformers: what they compute is what the whole network does, forward and backward, in every family."""

import itertools

import pytest
import torch
from tiny_transformers import FAMILY_NAMES, tiny_latents, tiny_prompt, tiny_transformer

from hollow_core.data.patches import Place
from hollow_core.errors import HollowError
from hollow_core.lora.layers import add_lora, named_lora_parameters
from hollow_core.nets.conditioning import Conditioning
from hollow_core.nets.network import removed_fraction

T = [700]


def all_cuts(network):
    length = len(network.listed())
    return [(n, m) for n, m in itertools.product(range(length), repeat=2) if 0 < n + m < length]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_hollowed_forward_is_the_full_one_at_any_cut(name):
    network = tiny_transformer(name)
    noisy, prompt = tiny_latents(network), tiny_prompt(network)
    with torch.no_grad():
        full = network.predict(noisy, T, prompt, {})
        assert full.shape == noisy.shape
        assert full.std() > 1e-3
        for cut in all_cuts(network):
            stored = network.base(cut)(noisy, T, prompt)
            hollowed = network.hollow(cut, T)
            torch.testing.assert_close(hollowed.predict(noisy, T, prompt, stored), full, rtol=1e-4, atol=1e-5)
            assert removed_fraction(network, cut) > 0
            gone = set(network.removed(cut))
            left = {path for path, _ in hollowed.module.named_modules()}
            assert not gone & {path for path in left if network_has(hollowed, path)}


def network_has(network, path):
    return any(True for _ in network.module.get_submodule(path).parameters())


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_residual_and_the_state_matter(name):
    network = tiny_transformer(name)
    noisy, prompt = tiny_latents(network), tiny_prompt(network)
    stored = network.base((1, 1))(noisy, T, prompt)
    hollowed = network.hollow((1, 1), T)
    with torch.no_grad():
        true = hollowed.predict(noisy, T, prompt, stored)
        for key in stored:
            without = hollowed.predict(noisy, T, prompt, {**stored, key: torch.zeros_like(stored[key])})
            assert (without - true).abs().max() > 1e-4, key


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_kept_blocks_are_the_full_networks_with_the_residual_held_fixed(name, checkpointing):
    cut = (1, 1)
    network = tiny_transformer(name)
    noisy, prompt = tiny_latents(network), tiny_prompt(network)
    target = tiny_latents(network, seed=5)
    stored = network.base(cut)(noisy, T, prompt)

    # the full network: run all of it, and hold the back's residual fixed by a hook behind its last block
    blocks = network.listed()
    first, last = blocks[1], blocks[-2]
    add_lora(
        network.module,
        2,
        targets=("to_q",),
        generator=torch.Generator().manual_seed(0),
        within=(f"{last.path}.{last.name}.",),
    )
    for matrix in named_lora_parameters(network.module).values():
        torch.nn.init.normal_(matrix, std=0.1, generator=torch.Generator().manual_seed(3))
    assert first.name != last.name or first.path != last.path

    whole = {}
    end = blocks[-1].module
    original = end.forward

    def held(*arguments, **named):
        given = arguments[0] if arguments else named["hidden_states"]
        text = arguments[1] if len(arguments) > 1 else named.get("encoder_hidden_states")
        tokens = noisy.shape[-1] * noisy.shape[-2] // 4
        place = slice(-tokens, None) if blocks[-1].streams == "text first" else slice(0, tokens)
        out = given.clone()
        out[:, place] = given[:, place] + stored["residual"]
        return (text, out) if blocks[-1].streams == "two" else out

    end.forward = held
    loss = (network.predict(noisy, T, prompt, {}) - target).square().mean()
    loss.backward()
    end.forward = original
    for key, matrix in named_lora_parameters(network.module).items():
        whole[key] = matrix.grad.clone()
        matrix.grad = None

    hollowed = network.hollow(cut, T)
    if checkpointing:
        hollowed.checkpoint(None)
    again = (hollowed.predict(noisy, T, prompt, stored) - target).square().mean()
    torch.testing.assert_close(again, loss, rtol=1e-4, atol=1e-6)
    again.backward()
    assert whole
    assert any(gradient.abs().max() > 1e-7 for gradient in whole.values())
    for key, matrix in named_lora_parameters(hollowed.module).items():
        torch.testing.assert_close(matrix.grad, whole[key], rtol=1e-3, atol=1e-7)


def position_codes(network, place, height, width):
    """What the network's blocks are given of places, and the embedded image, for latents of zeros: by hooks, as no
    attribute is common to all."""
    prompt = tiny_prompt(network)._replace(place=None if place is None else torch.tensor([place]))
    seen = []

    def codes(tensors):
        for each in tensors:
            if isinstance(each, tuple | list):
                yield from codes(each)
            elif isinstance(each, torch.Tensor):
                yield each

    paths = [*network.family.refiners, *(blocks.path for blocks in network.family.blocks)]
    first = network.module.get_submodule(f"{paths[0]}.0")
    hook = first.register_forward_pre_hook(
        lambda _, given, named: seen.extend(codes([*given, *named.values()])), with_kwargs=True
    )
    latents = torch.zeros(1, network.family.channels(network.config), height, width)
    with hook, torch.no_grad():
        network.predict(latents, T, prompt, {})
    return seen


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_crop_has_the_position_codes_of_its_place_in_the_whole(name):
    """Of latents of zeros all tokens of the image are alike but for their places."""
    network, place = tiny_transformer(name), Place(row=1, column=3, rows=6, columns=8)
    height, width = 3, 2
    whole = position_codes(network, None, 2 * place.rows, 2 * place.columns)
    crop = position_codes(network, place, 2 * height, 2 * width)
    there = torch.arange(place.rows * place.columns).unflatten(0, (place.rows, place.columns))
    there = there[place.row : place.row + height, place.column : place.column + width].flatten()
    checked = 0
    for large, small in zip(whole, crop, strict=True):
        axis = [n for n, (a, b) in enumerate(zip(large.shape, small.shape, strict=True)) if a != b]
        if not axis:
            torch.testing.assert_close(small, large)
            continue
        (axis,) = axis
        first = 5 if name == "krea2" else 0  # text comes first
        first += 5 if name == "flux" and large.dim() == 2 else 0
        expected = large.index_select(axis, there + first)
        torch.testing.assert_close(small.narrow(axis, first, height * width), expected, msg=lambda m: f"{name}: {m}")
        checked += 1
    assert checked
    elsewhere = position_codes(network, place._replace(row=0), 2 * height, 2 * width)
    assert any(not torch.equal(a, b) for a, b in zip(crop, elsewhere, strict=True))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_crop_as_large_as_the_whole_is_the_whole(name):
    network = tiny_transformer(name)
    noisy, prompt = tiny_latents(network), tiny_prompt(network)
    height, width = (side // 2 for side in noisy.shape[-2:])
    with torch.no_grad():
        expected = network.predict(noisy, T, prompt, {})
        placed = prompt._replace(place=torch.tensor([Place(0, 0, height, width)]))
        assert torch.equal(network.predict(noisy, T, placed, {}), expected)
        moved = prompt._replace(place=torch.tensor([Place(0, 1, height + 5, width + 3)]))
        hears = name != "anima"  # of the image alone, and of it only how far tokens are from each other
        assert torch.allclose(network.predict(noisy, T, moved, {}), expected, atol=1e-4) != hears
        assert torch.equal(network.predict(noisy, T, prompt, {}), expected)  # nothing stays behind


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_crops_are_hollowed_as_wholes_are_with_checkpointing(name):
    network = tiny_transformer(name)
    noisy, prompt = tiny_latents(network), tiny_prompt(network)._replace(place=torch.tensor([Place(1, 2, 7, 8)]))
    full = network.predict(noisy, T, prompt, {})
    stored = network.base((1, 1))(noisy, T, prompt)
    hollowed = network.hollow((1, 1), T)
    add_lora(hollowed.module, 2, targets=("to_q",), generator=torch.Generator().manual_seed(0), within=network.within)
    hollowed.checkpoint(None)
    again = hollowed.predict(noisy, T, prompt, stored)
    torch.testing.assert_close(again, full, rtol=1e-4, atol=1e-5)
    again.square().mean().backward()
    assert all(matrix.grad is not None for matrix in named_lora_parameters(hollowed.module).values())


def test_crops_of_other_places_do_not_pass_together():
    network = tiny_transformer("flux")
    noisy, prompt = tiny_latents(network), tiny_prompt(network)
    places = [prompt._replace(place=torch.tensor([Place(row, 0, 8, 8)])) for row in (0, 1)]
    assert len({each.alike for each in [*places, *places, prompt]}) == 3
    with pytest.raises(HollowError, match="different places"):
        network.predict(torch.cat([noisy] * 2), T * 2, Conditioning.batch(places), {})


def test_what_only_hollowed_blocks_had_gets_no_lora():
    network = tiny_transformer("flux")  # two double blocks and three single ones
    assert {"to_out.0", "add_q_proj"} <= set(network.targets.attention)
    assert network.hollow((2, 1), T).targets.attention == ("to_q", "to_k", "to_v")
    assert network.hollow((1, 1), T).targets == network.targets
