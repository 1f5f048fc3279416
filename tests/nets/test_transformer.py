"""Hollowed transformers: what they compute is what the whole network does, forward and backward, in every family."""

import itertools

import pytest
import torch
from tiny_transformers import FAMILY_NAMES, tiny_latents, tiny_prompt, tiny_transformer

from hollow_core.lora.layers import add_lora, named_lora_parameters
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
