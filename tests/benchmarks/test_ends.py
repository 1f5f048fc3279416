"""The other ways to take blocks out do what their table says of them."""

import torch
from tiny_transformers import tiny_latents, tiny_prompt, tiny_transformer

from benchmarks.ends.__main__ import SPLITS, WAYS
from benchmarks.ends.networks import FEATURE, MiddleOut, MiddleResidual, TwoPaths, WithoutResidual
from hollow_core.nets.transformer import RESIDUAL, Transformer

T = [600]


def test_without_a_residual_the_back_adds_nothing():
    network = WithoutResidual(tiny_transformer("z-image").module)
    noisy, prompt = tiny_latents(network), tiny_prompt(network)
    stored = network.base((1, 1))(noisy, T, prompt)
    assert not stored[RESIDUAL].any()
    front_only = network.hollow((1, 1), None).predict(noisy, T, prompt, stored)
    shorter = Transformer(network.view(network.listed()[:-1]))
    torch.testing.assert_close(front_only, shorter.predict(noisy, T, prompt, {}))


def test_a_middle_that_is_handed_in_hides_the_picture_of_the_front():
    """What is before it is heard by the text's tokens alone; the residual lets both through."""
    network = tiny_transformer("z-image")
    noisy, prompt, other = tiny_latents(network), tiny_prompt(network), tiny_latents(network, seed=9)
    for kind, hidden in ((MiddleOut, True), (MiddleResidual, False)):
        of_kind = kind(network.module)
        stored = of_kind.base((1, 3))(noisy, T, prompt)
        hollowed = of_kind.hollow((1, 3), None)
        one, two = (hollowed.predict(picture, T, prompt, stored) for picture in (noisy, other))
        text_alone = hollowed.predict(noisy, T, prompt, {FEATURE: torch.zeros_like(stored[FEATURE])})
        assert ((one - two).abs().max() < (one - text_alone).abs().max()) == hidden


def test_two_paths_take_the_generic_prompt_for_the_middle():
    network = tiny_transformer("z-image")
    noisy, personal, generic = tiny_latents(network), tiny_prompt(network), tiny_prompt(network, tokens=4, seed=8)
    middle = MiddleOut(network.module)
    stored = middle.base((1, 3))(noisy, T, generic)
    expected = middle.hollow((1, 3), None).predict(noisy, T, personal, stored)
    paired = TwoPaths(network.module, (1, 3), [(personal, generic)])
    torch.testing.assert_close(paired.predict(noisy, T, personal, {}), expected)


def test_every_split_and_way_takes_out_what_it_is_called():
    assert {sum(way.cut) for way in SPLITS} == {4, 6}
    for way in WAYS:
        if way.name.startswith(("30", "50")):
            a, b = way.cut
            assert (b - a if issubclass(way.kind, MiddleOut) else a + b) == (4 if way.name.startswith("30") else 6)
