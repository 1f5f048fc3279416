"""LoRA layers: the paper's sizes, reproducible, the same in every view, and gone without a trace."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from hollow_core.errors import HollowError
from hollow_core.lora.layers import (
    ALL_LAYERS,
    add_lora,
    layers_of_any_lora,
    load_lora_state,
    lora_off,
    lora_parameters,
    lora_state,
    named_lora_parameters,
    remove_lora,
    set_strength,
)
from hollow_core.models.layouts import layout_config
from hollow_core.nets.residency import quantize, stream
from hollow_core.nets.unet import head, hollow


def seed(number=0):
    return torch.Generator().manual_seed(number)


def trained_lora(unet, rank=4, **options):
    """A LoRA that changes something."""
    add_lora(unet, rank, generator=seed(), **options)
    with torch.no_grad():
        for parameter in lora_parameters(unet):
            parameter.copy_(torch.randn(parameter.shape, generator=seed(parameter.numel())))


def trained_dora(unet, rank=4, **options):
    """The same, with other magnitudes, too."""
    add_lora(unet, rank, dora=True, generator=seed(), **options)
    with torch.no_grad():
        for key, parameter in named_lora_parameters(unet).items():
            random = torch.randn(parameter.shape, generator=seed(parameter.numel()))
            if "magnitude" in key:
                parameter *= 1 + 0.2 * random
            else:
                parameter.copy_(random * 0.3)


def predict(unet, tiny_conditioning):
    dtype, conditioning = unet.conv_in.weight.dtype, tiny_conditioning(unet).to("cpu", unet.conv_in.weight.dtype)
    with torch.no_grad():
        return unet(torch.randn(1, 4, 16, 16, generator=seed()).to(dtype), 9, **conditioning.kwargs()).sample


@pytest.mark.parametrize(("rank", "cut", "count"), [(128, None, 26_558_464), (128, 3, 24_002_560), (1, None, 207_488)])
def test_sizes_of_the_paper(rank, cut, count):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(layout_config("sd21"))
    held = unet if cut is None else hollow(unet, cut, timesteps=[0])
    add_lora(held, rank, generator=seed())
    assert sum(parameter.numel() for parameter in lora_parameters(held)) == count


def test_the_same_seed_gives_the_same_lora_and_leaves_the_global_one_alone(tiny_unet, tiny_conditioning):
    unet = tiny_unet("sd15")
    before, drawn = predict(unet, tiny_conditioning), torch.random.get_rng_state()
    add_lora(unet, 4, generator=seed(1))
    first = lora_state(unet)
    add_lora(unet, 4, generator=seed(1))
    second = lora_state(unet)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    add_lora(unet, 4, generator=seed(2))
    assert not any(torch.equal(first[key], value) for key, value in lora_state(unet).items() if "_A" in key)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert torch.equal(predict(unet, tiny_conditioning), before)
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight" in first


def test_only_the_lora_is_trainable_and_in_fp32(tiny_unet):
    unet = tiny_unet("sd15").to(torch.bfloat16)
    add_lora(unet, 4, generator=seed())
    trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    assert [id(p) for p in trainable] == [id(p) for p in lora_parameters(unet)]
    assert {parameter.dtype for parameter in trainable} == {torch.float32}


def test_strength_off_and_removal(tiny_unet, tiny_conditioning):
    unet = tiny_unet("sd21")
    names, base = list(unet.state_dict()), predict(unet, tiny_conditioning)
    trained_lora(unet, alpha=2.0)
    full = predict(unet, tiny_conditioning)
    assert (full - base).abs().max() > 0.01
    set_strength(unet, 0.5)
    half = predict(unet, tiny_conditioning)
    with torch.no_grad():  # the same by hand: W + 0.5 · alpha / rank · BA in a plain U-Net
        merged = tiny_unet("sd21")
        for path, a, b in matrices(lora_state(unet)):
            merged.get_submodule(path).weight += 0.5 * 2.0 / 4 * b @ a
    torch.testing.assert_close(half, predict(merged, tiny_conditioning), atol=1e-4, rtol=1e-4)
    with lora_off(layers_of_any_lora(unet)):
        assert torch.equal(predict(unet, tiny_conditioning), base)
    assert torch.equal(predict(unet, tiny_conditioning), half)
    assert all(parameter.requires_grad for parameter in lora_parameters(unet))
    set_strength(unet, 1.0)
    assert torch.equal(predict(unet, tiny_conditioning), full)
    remove_lora(unet)
    assert list(unet.state_dict()) == names
    assert torch.equal(predict(unet, tiny_conditioning), base)


def matrices(state):
    for key in state:
        if key.endswith(".lora_A.weight"):
            path = key.removesuffix(".lora_A.weight")
            yield path, state[key], state[f"{path}.lora_B.weight"]


def test_views_share_the_lora(tiny_unet):
    unet = tiny_unet("sdxl")
    hollowed, base_path = hollow(unet, 1), head(unet, 1)
    add_lora(hollowed, 4, generator=seed())
    state = lora_state(hollowed)
    assert lora_state(unet).keys() == state.keys()
    assert set(lora_state(base_path)) < set(state)
    assert not any(key.startswith(("mid_block", "down_blocks.2.attentions.1")) for key in state)
    with lora_off(layers_of_any_lora(unet)):
        assert all(layer.disable_adapters for layer in hollowed.modules() if hasattr(layer, "lora_A"))
    remove_lora(unet)
    assert not lora_state(hollowed)
    load_lora_state(unet, state, alpha=4)
    assert lora_state(hollowed).keys() == state.keys()


def test_state_survives_a_round_trip_into_another_unet(tiny_unet, tiny_conditioning):
    unet, other = tiny_unet("sd15"), tiny_unet("sd15")
    every_layer = [path for path, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    trained_lora(unet, alpha=0.1, targets=every_layer)
    state = lora_state(unet)
    assert len(state) == 2 * len(every_layer)
    add_lora(other, 2, generator=seed())  # is replaced
    load_lora_state(other, state, alpha=0.1)
    assert torch.equal(predict(other, tiny_conditioning), predict(unet, tiny_conditioning))
    lora_parameters(unet)[0].data.zero_()
    assert any(value.any() for value in state.values())  # a snapshot


def test_ranks_may_differ(tiny_unet):
    unet = tiny_unet("sd15")
    trained_lora(unet)
    state = lora_state(unet)
    a = next(key for key in state if "up_blocks.3" in key and "lora_A" in key)
    b = a.replace("lora_A", "lora_B")
    state[a], state[b] = state[a][:1], state[b][:, :1].contiguous()
    load_lora_state(unet, state, alpha=4)
    assert all(torch.equal(value, state[key]) for key, value in lora_state(unet).items())


def test_a_lora_that_does_not_fit_is_refused_and_changes_nothing(tiny_unet):
    unet, wider = tiny_unet("sd15"), tiny_unet("sd21")
    deeper = tiny_unet("sd15", transformer_layers_per_block=2)
    trained_lora(unet)
    before = lora_state(unet)
    for other in (wider, deeper):
        trained_lora(other)
    with pytest.raises(HollowError, match=r"attn2\.to_k has shapes \(4, 16\).*this U-Net needs \(4, 12\)"):
        load_lora_state(unet, lora_state(wider), alpha=4)
    with pytest.raises(HollowError, match=r"transformer_blocks\.1\..* which this U-Net has not"):
        load_lora_state(unet, lora_state(deeper), alpha=4)
    key = next(iter(before))
    with pytest.raises(HollowError, match="only one of two matrices"):
        load_lora_state(unet, {key: before[key]}, alpha=4)
    with pytest.raises(HollowError, match="holds no matrices"):
        load_lora_state(unet, {}, alpha=4)
    assert all(torch.equal(value, before[key]) for key, value in lora_state(unet).items())


def test_bad_ranks_and_targets_are_refused(tiny_unet):
    unet = tiny_unet("sd15")
    with pytest.raises(HollowError, match="rank 0 holds nothing"):
        add_lora(unet, 0, generator=seed())
    with pytest.raises(HollowError, match="no layer 'q_proj' to put a LoRA on"):
        add_lora(unet, 4, targets=["to_q", "q_proj"], generator=seed())
    with pytest.raises(HollowError, match="no layer 'norm1' to put a LoRA on"):
        add_lora(unet, 4, targets=["norm1"], generator=seed())


def test_a_unet_with_another_lora_is_refused(tiny_unet):
    unet = tiny_unet("sd15")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(HollowError, match=r"carries another LoRA\. Unload it first"):
        add_lora(unet, 4, generator=seed())


# --- DoRA ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_dora_changes_nothing(tiny_unet, tiny_conditioning, dtype):
    unet = tiny_unet("sd21").to(dtype)
    with torch.no_grad():
        unet.get_submodule("mid_block.attentions.0.proj_in").weight[0] = 0  # an output that has no direction
    base = predict(unet, tiny_conditioning)
    add_lora(unet, 4, targets=ALL_LAYERS, dora=True, generator=seed())
    assert torch.equal(predict(unet, tiny_conditioning), base)
    assert {parameter.dtype for parameter in lora_parameters(unet)} == {torch.float32}
    add_lora(unet, 4, targets=ALL_LAYERS, generator=seed())
    plain = lora_state(unet)
    add_lora(unet, 4, targets=ALL_LAYERS, dora=True, generator=seed())
    state = lora_state(unet)
    assert all(torch.equal(value, state[key]) for key, value in plain.items())
    assert len(state) == len(plain) * 3 / 2


def test_dora_brings_each_output_to_its_magnitude(tiny_unet, tiny_conditioning):
    """Against weights made by hand; strength goes from W to them in a straight line, as in ComfyUI."""
    unet = tiny_unet("sd21")
    base = predict(unet, tiny_conditioning)
    trained_dora(unet, alpha=2.0, targets=ALL_LAYERS)
    state = lora_state(unet)
    for strength in (0.0, 0.5, 1.0):
        set_strength(unet, strength)
        merged = tiny_unet("sd21")
        with torch.no_grad():
            for path, a, b in matrices(state):
                weight = merged.get_submodule(path).weight
                moved = weight.flatten(1) + 2.0 / 4 * b.flatten(1) @ a.flatten(1)
                moved *= (state[f"{path}.lora_magnitude_vector.weight"] / moved.norm(dim=1))[:, None]
                weight += strength * (moved.view_as(weight) - weight)
        expected = predict(merged, tiny_conditioning)
        torch.testing.assert_close(predict(unet, tiny_conditioning), expected, atol=1e-4, rtol=1e-4)
    assert (expected - base).abs().max() > 0.01
    with lora_off(layers_of_any_lora(unet)):
        assert torch.equal(predict(unet, tiny_conditioning), base)
    other = tiny_unet("sd21")
    load_lora_state(other, state, alpha=2.0)
    assert torch.equal(predict(other, tiny_conditioning), predict(unet, tiny_conditioning))
    remove_lora(unet)
    assert torch.equal(predict(unet, tiny_conditioning), base)


@pytest.mark.slow
def test_dora_brings_each_input_to_its_magnitude(tiny_unet, tiny_conditioning):
    """As the one above, column by column, as LyCORIS has it: a convolution's columns are those of all of its kernel.
    Streamed weights are there the second time that a layer needs them, too."""
    whole, streamed = tiny_unet("sd21"), tiny_unet("sd21")
    stream(streamed, "cpu")
    trained_dora(whole, targets=ALL_LAYERS)
    state, plain = lora_state(whole), tiny_unet("sd21")
    for key in [key for key in state if "magnitude" in key]:
        weight = plain.get_submodule(key.rsplit(".lora_", 1)[0]).weight.detach()
        norms = weight.transpose(0, 1).flatten(1).norm(dim=1)
        state[key] = (norms * (1 + 0.2 * torch.randn(norms.shape, generator=seed(len(norms)))))[None]
    for unet in (whole, streamed):
        load_lora_state(unet, state, alpha=2.0)
    assert all(torch.equal(value, state[key]) for key, value in lora_state(whole).items())
    for strength in (0.5, 1.0):
        merged = tiny_unet("sd21")
        with torch.no_grad():
            for path, a, b in matrices(state):
                weight = merged.get_submodule(path).weight
                moved = weight + 2.0 / 4 * (b.flatten(1) @ a.flatten(1)).view_as(weight)
                dims = [dim for dim in range(weight.dim()) if dim != 1]
                magnitudes = state[f"{path}.lora_magnitude_vector.weight"].view(1, -1, *[1] * (weight.dim() - 2))
                moved *= magnitudes / torch.linalg.vector_norm(moved, dim=dims, keepdim=True)
                weight += strength * (moved - weight)
        expected = predict(merged, tiny_conditioning)
        for unet in (whole, streamed):
            set_strength(unet, strength)
            torch.testing.assert_close(predict(unet, tiny_conditioning), expected, atol=1e-4, rtol=1e-4)
    assert (expected - predict(plain, tiny_conditioning)).abs().max() > 0.01


def test_dora_has_pefts_gradients(tiny_unet, tiny_conditioning):
    ours, pefts = tiny_unet("sd15"), tiny_unet("sd15")
    trained_dora(ours, alpha=3.0, targets=ALL_LAYERS)
    config = LoraConfig(r=4, lora_alpha=3, use_dora=True, target_modules=list(ALL_LAYERS))
    inject_adapter_in_model(config, pefts, "hollow")
    theirs = named_lora_parameters(pefts)
    for key, parameter in named_lora_parameters(ours).items():
        theirs[key].data.copy_(parameter.data.view_as(theirs[key]))
    for unet in (ours, pefts):
        unet(torch.randn(1, 4, 16, 16, generator=seed()), 9, **tiny_conditioning(unet).kwargs()).sample.sum().backward()
    for key, parameter in named_lora_parameters(ours).items():
        gradient = theirs[key].grad.view_as(parameter)
        tolerance = 1e-4 * float(gradient.abs().max()) + 1e-5
        torch.testing.assert_close(
            parameter.grad, gradient, atol=tolerance, rtol=1e-3, msg=lambda told, key=key: key + told
        )


def test_dora_finds_the_norms_of_weights_that_are_quantised_or_away(tiny_unet, tiny_conditioning):
    whole, streamed = tiny_unet("sd15"), tiny_unet("sd15")
    stream(streamed, "cpu")
    quantised, rounded = tiny_unet("sd15"), tiny_unet("sd15")
    quantize(quantised, 8)
    with torch.no_grad():
        for path, layer in rounded.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.weight.copy_(quantised.get_submodule(path).weight)
    for unet in (whole, streamed, quantised, rounded):
        trained_dora(unet, targets=ALL_LAYERS)
    predict(streamed, tiny_conditioning)  # the second time, weights are sent ahead
    assert torch.equal(predict(streamed, tiny_conditioning), predict(whole, tiny_conditioning))
    torch.testing.assert_close(predict(quantised, tiny_conditioning), predict(rounded, tiny_conditioning))


def test_a_dora_without_all_its_magnitudes_is_refused(tiny_unet):
    unet = tiny_unet("sd15")
    trained_dora(unet)
    state = lora_state(unet)
    key = next(key for key in state if "magnitude" in key)
    with pytest.raises(HollowError, match=r"has 0 magnitudes for .*, not 8\. Get or make"):
        load_lora_state(unet, {each: value for each, value in state.items() if each != key}, alpha=4)
