"""A hollowed U-Net computes what the whole one does, holds only what remains, and has the same gradients."""

import gc
import weakref

import pytest
import torch
from diffusers import ControlNetModel
from torch import nn

from hollow_core.errors import HollowError
from hollow_core.lora.layers import ATTENTION, add_lora
from hollow_core.nets.unet import head, hollow
from hollow_core.nets.unet_layers import exit_shape, hollowed_layers, max_cut

EVEN, ODD = (16, 16), (13, 10)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [EVEN, ODD])
@torch.no_grad()
def test_hollowed_forward_equals_full_forward_at_every_cut(tiny_unet, tiny_conditioning, layout, size):
    unet = tiny_unet(layout)
    add_lora(unet, 4, generator=torch.Generator().manual_seed(0))
    sample, prompt = noise(2, 4, *size), tiny_conditioning(unet, batch=2).kwargs()
    timestep = torch.tensor([731, 20])
    full = unet(sample, timestep, **prompt).sample
    for cut in range(max_cut(unet.config) + 1):
        activation = head(unet, cut)(sample, timestep, **prompt).sample
        assert activation.shape == (2, *exit_shape(unet.config, cut, *size))
        hollowed = hollow(unet, cut)
        out = hollowed(sample, timestep, exit_activation=activation, **prompt).sample
        torch.testing.assert_close(out, full, atol=1e-5, rtol=1e-5)
        without_middle = hollowed(sample, timestep, exit_activation=0 * activation, **prompt).sample
        assert (without_middle - full).abs().max() > 1e-3


@torch.no_grad()
def test_first_level_without_attention_and_last_with_it(tiny_unet, tiny_conditioning):
    unet = tiny_unet(
        "sd21",
        in_channels=8,
        out_channels=8,
        down_block_types=["DownBlock2D"] + 3 * ["CrossAttnDownBlock2D"],
        up_block_types=3 * ["CrossAttnUpBlock2D"] + ["UpBlock2D"],
        layers_per_block=[1, 2, 1, 2],
    )
    sample, prompt = noise(1, 8, 12, 12), tiny_conditioning(unet).kwargs()
    full = unet(sample, 5, **prompt).sample
    for cut in range(max_cut(unet.config) + 1):
        activation = head(unet, cut)(sample, 5, **prompt).sample
        out = hollow(unet, cut)(sample, 5, exit_activation=activation, **prompt).sample
        torch.testing.assert_close(out, full, atol=1e-5, rtol=1e-5)


def test_hollow_copies_no_weight_and_keeps_every_name(tiny_unet, layout):
    unet = tiny_unet(layout)
    base = {name: parameter.data_ptr() for name, parameter in unet.named_parameters()}
    for cut in range(max_cut(unet.config) + 1):
        hollowed = hollow(unet, cut)
        remaining = {name: parameter.data_ptr() for name, parameter in hollowed.named_parameters()}
        paths = [path for layer in hollowed_layers(unet.config, cut) for path in layer.modules]
        gone = tuple(f"{path}." for path in [*paths, "time_embedding"])
        assert remaining == {name: pointer for name, pointer in base.items() if not name.startswith(gone)}
        assert remaining.keys() == hollowed.state_dict().keys()
    assert {name: parameter.data_ptr() for name, parameter in unet.named_parameters()} == base


def test_deleting_the_base_frees_the_middle(tiny_unet):
    unet = tiny_unet("sd21")
    hollowed = hollow(unet, 3, timesteps=[10, 20])
    parameters = {name: weakref.ref(parameter) for name, parameter in unet.named_parameters()}
    remaining = {name for name, _ in hollowed.named_parameters()}
    del unet
    gc.collect()
    assert {name for name, parameter in parameters.items() if parameter() is not None} == remaining


@pytest.mark.parametrize(("cut", "everywhere"), [(0, False), (3, False), (5, False), (3, True)])
def test_lora_gradients_equal_those_of_the_full_unet_with_the_exit_detached(
    tiny_unet, tiny_conditioning, cut, everywhere
):
    unet = tiny_unet("sd21")
    paths = [path for path, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    trainable = [path for path in paths if not path.startswith("time_embedding")]
    targets = trainable if everywhere else ATTENTION
    add_lora(unet, 4, targets=targets, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * noise(*parameter.shape, seed=len(name)))
    sample, target, prompt = noise(1, 4, *EVEN), noise(1, 4, *EVEN, seed=1), tiny_conditioning(unet).kwargs()

    def gradients(model, **kwargs):
        unet.zero_grad()
        loss = nn.functional.mse_loss(model(sample, 300, **prompt, **kwargs).sample, target)
        loss.backward()
        return {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}

    exit_activation = []

    def detach(module, inputs, output):
        activation = output[0] if isinstance(output, tuple) else output  # an attention puts out a tuple
        exit_activation.append(activation.detach())
        return (exit_activation[0],) if isinstance(output, tuple) else exit_activation[0]

    # The whole U-Net, nothing but a hook on the module that puts out the exit activation.
    handle = unet.get_submodule(hollowed_layers(unet.config, cut)[-1].modules[-1]).register_forward_hook(detach)
    expected = gradients(unet)
    handle.remove()
    found = gradients(hollow(unet, cut), exit_activation=exit_activation[0])
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.any()
        torch.testing.assert_close(gradient, expected[name], atol=1e-7, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cut", [0, 3, 6])
def test_controlnet_residuals_reach_what_remains(tiny_unet, tiny_conditioning, cut):
    unet = tiny_unet("sd15")
    channels = (4, 4, 4, 8)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
    sample, prompt = noise(1, 4, *EVEN), tiny_conditioning(unet).kwargs()
    picture = noise(1, 3, 128, 128)
    # A new ControlNet puts out zeros: take the shapes from it.
    zeros = controlnet(sample, 9, prompt["encoder_hidden_states"], picture, return_dict=False)
    down = [noise(*residual.shape, seed=i) for i, residual in enumerate(zeros[0])]
    residuals = {
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": noise(*zeros[1].shape, seed=99),
    }
    full = unet(sample, 9, **prompt, **residuals).sample
    activation = head(unet, cut)(sample, 9, **prompt, **residuals).sample
    out = hollow(unet, cut)(sample, 9, exit_activation=activation, **prompt, **residuals).sample
    torch.testing.assert_close(out, full, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_fractional_time_steps_when_the_mlp_is_kept(tiny_unet, tiny_conditioning):
    unet = tiny_unet("sd15")
    sample, prompt, timestep = noise(1, 4, *EVEN), tiny_conditioning(unet).kwargs(), torch.tensor(958.25)
    activation = head(unet, 3)(sample, timestep, **prompt).sample
    out = hollow(unet, 3, timesteps=None)(sample, timestep, exit_activation=activation, **prompt).sample
    torch.testing.assert_close(out, unet(sample, timestep, **prompt).sample, atol=1e-5, rtol=1e-5)
    with pytest.raises(HollowError, match=r"Time step 958\.25 was not precomputed .* pass timesteps=None"):
        hollow(unet, 3)(sample, timestep, exit_activation=activation, **prompt)


@torch.no_grad()
def test_an_activation_of_another_cut_is_refused(tiny_unet, tiny_conditioning):
    unet = tiny_unet("sd15")
    sample, prompt = noise(1, 4, *EVEN), tiny_conditioning(unet).kwargs()
    activation = head(unet, 0)(sample, 9, **prompt).sample
    with pytest.raises(HollowError, match=r"shape \(1, 24, 2, 2\), but cut 3 needs \(1, 24, 4, 4\)"):
        hollow(unet, 3)(sample, 9, exit_activation=activation, **prompt)
    with pytest.raises(HollowError, match=r"no cut 12. Choose a cut from 0 to 11"):
        hollow(unet, 12)


@torch.no_grad()
def test_an_fp16_activation_serves_an_fp32_unet(tiny_unet, tiny_conditioning):
    unet = tiny_unet("sdxl")
    sample, prompt = noise(1, 4, *EVEN), tiny_conditioning(unet).kwargs()
    activation = head(unet, 1)(sample, 9, **prompt).sample.half()
    out = hollow(unet, 1)(sample, 9, exit_activation=activation, **prompt).sample
    torch.testing.assert_close(out, unet(sample, 9, **prompt).sample, atol=1e-2, rtol=0)


def test_conditioning_moves_all_its_parts(tiny_unet, tiny_conditioning):
    prompt = tiny_conditioning(tiny_unet("sdxl")).to(dtype=torch.float16)
    assert [part.dtype for part in prompt if part is not None] == 3 * [torch.float16]
    assert tiny_conditioning(tiny_unet("sd15")).to("cpu").text_embeds is None
