"""Two-path sampling: the plain pipeline where both paths see the same, and the method's definition where not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    HeunDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from peft.tuners.lora import LoraLayer
from tiny_pipelines import Pipeline, shallow_pipeline, tiny_pipeline
from torch import Tensor

from hollow_core.errors import HollowError
from hollow_core.lora import file as lora_file
from hollow_core.lora.layers import add_lora, layers_of_any_lora, lora_off, lora_parameters, lora_state, remove_lora
from hollow_core.lora.metadata import Recipe
from hollow_core.nets.conditioning import Conditioning
from hollow_core.nets.unet_layers import exit_shape
from hollow_core.sampling.two_path import two_path

# diffusers' schedulers use tensors as arrays in ways that NumPy will give up, and torchsde minds rounding.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have ta>=t0:UserWarning"),
]

PERSONAL, GENERIC, NEGATIVE = "a photo of a sks dog", "a photo of a dog", "blurry"


def pipeline_with_lora(layout: str, seed: int = 0, make: Callable[[str], Pipeline] = tiny_pipeline) -> Pipeline:
    """A tiny pipeline whose U-Net carries a LoRA that changes a lot."""
    pipeline = make(layout)
    generator = torch.Generator().manual_seed(seed)
    add_lora(pipeline.unet, 4, generator=generator)
    for matrix in lora_parameters(pipeline.unet):
        matrix.data.copy_((torch.randn(matrix.shape, generator=generator) / 4).half())  # as a file holds it
    return pipeline


def encode(pipeline: Pipeline, *prompts: str) -> Conditioning:
    embeds, _, *pooled = pipeline.encode_prompt(
        list(prompts), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return Conditioning(embeds, pooled[0] if pooled else None)


def draw(pipeline: Any, prompt: str | list[str] = PERSONAL, **options: Any) -> np.ndarray:
    """Latents of a few steps, always from the same noise."""
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "negative_prompt": NEGATIVE, **options}
    if isinstance(prompt, list):
        options["negative_prompt"] = [options["negative_prompt"]] * len(prompt)
    return pipeline(prompt, output_type="latent", generator=torch.manual_seed(0), **options).images.numpy()


@contextmanager
def by_definition(pipeline: Pipeline, cut: int, generic: Conditioning, guided: bool = True) -> Iterator[None]:
    """Two-path sampling as the paper describes it, on the full U-Net with hooks.

    The whole U-Net runs twice. The first time, without LoRA and with the generic prompt on the positive rows, the
    input of the first remaining up layer is read; the second time it is written there.
    """
    unet, whole = pipeline.unet, pipeline.unet.forward
    up = [layer for block in unet.up_blocks for layer in block.resnets][cut]

    def forward(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        channels = exit_shape(unet.config, cut, *sample.shape[-2:])[0]
        negative = len(sample) // 2 if guided else 0

        def mixed(prompts: Tensor, other: Tensor) -> Tensor:
            return torch.cat([prompts[:negative], other.expand(len(prompts) - negative, *other.shape[1:])])

        base = dict(kwargs)
        if generic.text_embeds is not None:
            added = kwargs["added_cond_kwargs"]
            pooled = mixed(added["text_embeds"], generic.text_embeds)
            base["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": added["time_ids"]}
        read: list[Tensor] = []
        hook = up.register_forward_pre_hook(lambda _, args: read.append(args[0][:, :channels]))
        with lora_off(layers_of_any_lora(unet)):
            whole(sample, timestep, mixed(encoder_hidden_states, generic.encoder_hidden_states), **base)
        hook.remove()
        hook = up.register_forward_pre_hook(
            lambda _, args: (torch.cat([read[0], args[0][:, channels:]], dim=1), *args[1:])
        )
        prediction = whole(sample, timestep, encoder_hidden_states, **kwargs)
        hook.remove()
        return prediction

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward


@contextmanager
def base_passes(pipeline: Pipeline) -> Iterator[list[float]]:
    """How often the mid block, which only the base path has, ran."""
    passes: list[float] = []
    hook = pipeline.unet.mid_block.register_forward_hook(lambda *_: passes.append(1))
    try:
        yield passes
    finally:
        hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("cut", [0, 3, 6])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_same_prompt_at_strength_0_is_the_plain_pipeline(layout: str, cut: int, guidance: float) -> None:
    plain, pipeline = tiny_pipeline(layout), pipeline_with_lora(layout)
    expected = draw(plain, GENERIC, guidance_scale=guidance)
    with two_path(pipeline, cut=cut, generic=encode(plain, GENERIC), strength=0.0):
        np.testing.assert_allclose(draw(pipeline, GENERIC, guidance_scale=guidance), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [0, 2, 3, 6, 8])
def test_it_is_what_the_method_defines(layout: str, cut: int) -> None:
    pipeline = pipeline_with_lora(layout)
    plain, generic = draw(pipeline), encode(pipeline, GENERIC)
    with by_definition(pipeline, cut, generic):
        expected = draw(pipeline)
    with two_path(pipeline, cut=cut, generic=generic):
        np.testing.assert_allclose(draw(pipeline), expected, rtol=0, atol=1e-4)
    assert np.abs(expected - plain).max() > 1e-2  # the base path matters


@pytest.mark.slow
@pytest.mark.parametrize("size", [(120, 72), (64, 200)])
def test_odd_latents_without_guidance(layout: str, size: tuple[int, int]) -> None:
    pipeline = pipeline_with_lora(layout)
    generic = encode(pipeline, GENERIC)
    options = {"height": size[0], "width": size[1], "guidance_scale": 1.0}
    with by_definition(pipeline, 4, generic, guided=False):
        expected = draw(pipeline, **options)
    with two_path(pipeline, cut=4, generic=generic):
        np.testing.assert_allclose(draw(pipeline, **options), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_batch_is_its_pictures_one_by_one(layout: str) -> None:
    """Two prompts with their two generic ones, two pictures each, as diffusers lays them out."""
    pipeline = pipeline_with_lora(layout)
    personal, generics = ["a sks dog on grass", "a sks cat"], ["a dog on grass", "a cat"]
    noise = torch.randn(4, 4, 16, 16, generator=torch.manual_seed(1))
    with two_path(pipeline, cut=3, generic=encode(pipeline, *generics)):
        together = draw(pipeline, personal, latents=noise, num_images_per_prompt=2)
    for row in range(4):
        with two_path(pipeline, cut=3, generic=encode(pipeline, generics[row // 2])):
            alone = draw(pipeline, personal[row // 2], latents=noise[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], rtol=0, atol=1e-4)


def test_the_negative_prompt_stands_for_itself(layout: str) -> None:
    """Its prediction on the base path is what the plain U-Net makes of it, whatever the generic prompt."""
    plain, pipeline = tiny_pipeline(layout), pipeline_with_lora(layout)
    seen: dict[str, list[Tensor]] = {"plain": [], "two_path": []}
    with plain_outputs(plain.unet, seen["plain"]):
        draw(plain, GENERIC, num_inference_steps=1)
    paths = two_path(pipeline, cut=3, generic=encode(plain, "quite another thing"), strength=0.0)
    with paths, plain_outputs(pipeline.unet, seen["two_path"]):
        draw(pipeline, GENERIC, num_inference_steps=1)
    (expected,), (found,) = seen["plain"], seen["two_path"]
    torch.testing.assert_close(found[:1], expected[:1], rtol=0, atol=1e-5)
    assert (found[1:] - expected[1:]).abs().max() > 1e-3


@contextmanager
def plain_outputs(unet: UNet2DConditionModel, outputs: list[Tensor]) -> Iterator[None]:
    forward = unet.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        outputs.append(result[0])
        return result

    unet.forward = spy
    try:
        yield
    finally:
        del unet.forward


@pytest.mark.slow
@pytest.mark.parametrize(("refresh", "passes"), [(1, 6), (2, 3), (3, 2), (4, 2), (100, 1)])
def test_refresh_runs_the_base_path_every_nth_step(refresh: int, passes: int) -> None:
    pipeline = pipeline_with_lora("sd15")
    with two_path(pipeline, cut=3, generic=encode(pipeline, GENERIC), refresh=refresh):
        for _ in range(2):  # each run starts anew
            with base_passes(pipeline) as counted:
                draw(pipeline, num_inference_steps=6)
            assert len(counted) == passes


def test_a_second_run_starts_with_an_activation_of_its_own() -> None:
    pipeline = pipeline_with_lora("sd15")
    generic = encode(pipeline, GENERIC)
    with two_path(pipeline, cut=3, generic=generic, refresh=2):
        expected = draw(pipeline, num_inference_steps=1)
    with two_path(pipeline, cut=3, generic=generic, refresh=2):
        draw(pipeline, num_inference_steps=3)
        np.testing.assert_array_equal(draw(pipeline, num_inference_steps=1), expected)


@pytest.mark.slow
def test_a_scheduler_of_second_order_refreshes_at_time_steps_not_calls() -> None:
    """Heun calls the U-Net twice at each inner time step, on different latents."""
    pipeline = pipeline_with_lora("sd15")
    pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    for refresh, passes in ((1, 7), (2, 3), (4, 1)):  # at the time steps 0 1 1 2 2 3 3
        paths = two_path(pipeline, cut=3, generic=encode(pipeline, GENERIC), refresh=refresh)
        with paths, base_passes(pipeline) as counted:
            draw(pipeline, num_inference_steps=4)
        assert len(counted) == passes


COMPATIBLES = sorted(tiny_pipeline("sd15").scheduler.compatibles, key=lambda kind: kind.__name__)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPATIBLES, ids=lambda kind: kind.__name__)
def test_every_scheduler(kind: type[SchedulerMixin]) -> None:
    """At strength 0 and the same prompt: the plain pipeline. With the LoRA, and without refresh: finite."""
    plain, pipeline = shallow_pipeline("sd21"), pipeline_with_lora("sd21", make=shallow_pipeline)
    for pipe in (plain, pipeline):
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    expected = draw(plain, GENERIC, num_inference_steps=4)
    with two_path(pipeline, cut=1, generic=encode(plain, GENERIC), strength=0.0):
        np.testing.assert_allclose(draw(pipeline, GENERIC, num_inference_steps=4), expected, rtol=1e-4, atol=1e-4)
    with two_path(pipeline, cut=1, generic=encode(plain, GENERIC), strength=0.1, refresh=2):
        assert np.isfinite(draw(pipeline, num_inference_steps=4)).all()


def test_controlnet_residuals_reach_both_paths() -> None:
    plain = tiny_pipeline("sd15")
    torch.manual_seed(3)
    controlnet = ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(4, 8, 8, 8)).eval()
    for parameter in controlnet.parameters():  # its last layers start at zero
        parameter.data += torch.randn_like(parameter) * 0.1
    control = torch.rand(1, 3, 128, 128)

    def with_control(pipeline: Pipeline) -> Any:
        parts = {**pipeline.components, "controlnet": controlnet, "requires_safety_checker": False}
        controlled = StableDiffusionControlNetPipeline(**parts)
        controlled.set_progress_bar_config(disable=True)
        return controlled

    without, plain = draw(plain, GENERIC), with_control(plain)
    expected = draw(plain, GENERIC, image=control)
    assert np.abs(expected - without).max() > 1e-2
    pipeline = with_control(pipeline_with_lora("sd15"))
    for cut in (0, 4):
        with two_path(pipeline, cut=cut, generic=encode(pipeline, GENERIC), strength=0.0):
            np.testing.assert_allclose(draw(pipeline, GENERIC, image=control), expected, rtol=0, atol=1e-4)


def lora_switches(unet: UNet2DConditionModel) -> list[Any]:
    """Everything that peft could have switched."""
    layers = [module for module in unet.modules() if isinstance(module, LoraLayer)]
    return [
        *((dict(layer.scaling), layer.disable_adapters, list(layer.active_adapters)) for layer in layers),
        *(parameter.requires_grad for parameter in unet.parameters()),
    ]


@pytest.mark.parametrize("failing_at", [None, "the personal path", "the base path"])
def test_afterwards_everything_is_as_before(failing_at: str | None) -> None:
    pipeline = pipeline_with_lora("sd15")
    unet, switches, expected = pipeline.unet, lora_switches(pipeline.unet), draw(pipeline)
    weights = {name: weight.clone() for name, weight in unet.state_dict().items()}
    parts, attributes = dict(pipeline.config), set(vars(unet))
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    places = {"the personal path": unet.up_blocks[-1].resnets[-1], "the base path": unet.mid_block}
    hook = places[failing_at].register_forward_hook(fail) if failing_at else None
    paths = two_path(pipeline, cut=3, generic=encode(pipeline, GENERIC), strength=0.3)
    with pytest.raises(KeyboardInterrupt) if failing_at else nullcontext(), paths as inside:
        assert inside is pipeline
        assert pipeline.unet is not unet
        draw(pipeline)
    if hook:
        hook.remove()
    assert pipeline.unet is unet
    assert lora_switches(unet) == switches
    assert all(torch.equal(weight, weights[name]) for name, weight in unet.state_dict().items())
    assert (dict(pipeline.config), set(vars(unet))) == (parts, attributes)
    np.testing.assert_array_equal(draw(pipeline), expected)


def test_strength_scales_what_the_lora_adds() -> None:
    """Half the strength is half of B, which is half of ΔW."""
    half, pipeline = pipeline_with_lora("sd15"), pipeline_with_lora("sd15")
    for name, parameter in half.unet.named_parameters():
        if ".lora_B." in name:
            parameter.data /= 2
    generic = encode(pipeline, GENERIC)
    with two_path(half, cut=2, generic=generic):
        expected = draw(half)
    with two_path(pipeline, cut=2, generic=generic, strength=0.5):
        np.testing.assert_allclose(draw(pipeline), expected, rtol=0, atol=1e-5)


def test_no_cut_is_the_ordinary_path() -> None:
    pipeline = pipeline_with_lora("sd15")
    expected, unet = draw(pipeline), pipeline.unet
    with two_path(pipeline, cut=None, generic=encode(pipeline, GENERIC)):
        assert pipeline.unet is unet
        np.testing.assert_array_equal(draw(pipeline), expected)


@pytest.mark.slow
def test_a_lora_that_diffusers_loaded(tmp_path: Path, layout: str) -> None:
    """The same file by `load_lora_weights`: off on the base path, scaled on the personal one, and as before."""
    pipeline = pipeline_with_lora(layout)
    state, generic = lora_state(pipeline.unet), encode(pipeline, GENERIC)
    with two_path(pipeline, cut=3, generic=generic, strength=0.5):
        expected = draw(pipeline)
    remove_lora(pipeline.unet)
    path, recipe = tmp_path / "lora.safetensors", Recipe(3, "sks", "dog", PERSONAL, GENERIC)
    lora_file.save(path, state, pipeline.unet.config, alpha=4.0, layout=layout, recipe=recipe)
    pipeline.load_lora_weights(path)
    switches = lora_switches(pipeline.unet)
    with two_path(pipeline, cut=3, generic=generic, strength=0.5):
        np.testing.assert_allclose(draw(pipeline), expected, rtol=0, atol=2e-2)
    assert lora_switches(pipeline.unet) == switches


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.parametrize("cut", [None, 3])
def test_strength_multiplies_what_adapters_are_set_to(tmp_path: Path, cut: int | None) -> None:
    """As one says in diffusers how strong each of two LoRAs is."""
    pipeline, recipe = tiny_pipeline("sd15"), Recipe(3, "sks", "dog", PERSONAL, GENERIC)
    for seed, name in enumerate(("dog", "style")):
        state = lora_state(pipeline_with_lora("sd15", seed).unet)
        path = tmp_path / f"{name}.safetensors"
        lora_file.save(path, state, pipeline.unet.config, alpha=4.0, layout="sd15", recipe=recipe)
        pipeline.load_lora_weights(path, adapter_name=name)
    generic = encode(pipeline, GENERIC)

    def drawn(dog: float, style: float, strength: float) -> np.ndarray:
        pipeline.set_adapters(["dog", "style"], [dog, style])
        switches = lora_switches(pipeline.unet)
        with two_path(pipeline, cut=cut, generic=generic, strength=strength):
            picture = draw(pipeline)
        assert lora_switches(pipeline.unet) == switches
        return picture

    expected = drawn(0.6, 0.3, 1.0)
    if cut is None:
        np.testing.assert_array_equal(expected, draw(pipeline))
    np.testing.assert_allclose(drawn(1.2, 0.6, 0.5), expected, rtol=0, atol=1e-5)
    assert np.abs(drawn(1.0, 1.0, 1.0) - expected).max() > 1e-2
    np.testing.assert_array_equal(drawn(0.6, 0.3, 0.0), drawn(0.0, 0.0, 1.0))


def enable_freeu(pipeline: Pipeline) -> None:
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)


def write_into_what_comes_in(pipeline: Pipeline) -> None:
    pipeline.unet.up_blocks[1].register_forward_pre_hook(
        lambda _, args, kwargs: (kwargs["hidden_states"].mul_(1.4), None)[1], with_kwargs=True
    )


@pytest.mark.parametrize("writer", [enable_freeu, write_into_what_comes_in])
def test_what_writes_into_an_activation_meets_it_fresh_at_every_reuse(writer: Callable[[Pipeline], None]) -> None:
    pipeline = pipeline_with_lora("sd15")
    generic, prompts = encode(pipeline, GENERIC), encode(pipeline, PERSONAL).encoder_hidden_states
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    plain = pipeline.unet(latents, 499, prompts).sample
    writer(pipeline)
    assert (pipeline.unet(latents, 499, prompts).sample - plain).abs().max() > 1e-3
    draw(pipeline, num_inference_steps=1, guidance_scale=1.0)  # so that it knows there is no guidance
    pipeline.scheduler.timesteps = torch.tensor([500, 499])
    with two_path(pipeline, cut=3, generic=generic, refresh=2):
        pipeline.unet(latents, 500, prompts)
        first, *others = (pipeline.unet(latents, 499, prompts).sample for _ in range(3))
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@pytest.mark.slow
def test_model_offloading_moves_the_unet_in_and_out() -> None:
    """Enabled before, as one does on a small card; here the accelerator is the CPU too."""
    pipeline = pipeline_with_lora("sd15")
    generic = encode(pipeline, GENERIC)
    with two_path(pipeline, cut=3, generic=generic):
        expected = draw(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    moves: list[str] = []
    hook = pipeline.unet._hf_hook
    arrive = hook.pre_forward
    hook.pre_forward = lambda *args, **kwargs: (moves.append("in"), arrive(*args, **kwargs))[1]
    with two_path(pipeline, cut=3, generic=generic):
        np.testing.assert_array_equal(draw(pipeline), expected)
        assert len(moves) == 3
        np.testing.assert_array_equal(draw(pipeline), expected)
    np.testing.assert_array_equal(draw(pipeline), draw(pipeline_with_lora("sd15")))


def refusal(pipeline: Pipeline, prompt: Any = PERSONAL, **options: Any) -> str:
    unet = pipeline.unet
    with pytest.raises(HollowError) as refused, two_path(pipeline, **options):
        draw(pipeline, prompt)
    assert pipeline.unet is unet
    return str(refused.value)


def test_what_cannot_be_sampled_is_refused() -> None:
    pipeline, xl = pipeline_with_lora("sd15"), pipeline_with_lora("sdxl")
    generic = encode(pipeline, GENERIC)
    assert "no cut 12. Choose a cut from 0 to 11" in refusal(pipeline, cut=12, generic=generic)
    assert "cannot run every 0 steps. Choose a refresh" in refusal(pipeline, cut=3, generic=generic, refresh=0)
    for strength in (float("nan"), float("inf")):
        told = refusal(pipeline, cut=3, generic=generic, strength=strength)
        assert f"strength of a LoRA cannot be {strength}. Take 1 for as trained" in told
    two = encode(pipeline, GENERIC, GENERIC)
    assert "which does not fit 1 prompts of (77, 12)" in refusal(pipeline, cut=3, generic=two)
    assert "shape (1, 77, 20), which does not fit" in refusal(pipeline, cut=3, generic=encode(xl, GENERIC))
    without_pooled = encode(xl, GENERIC)._replace(text_embeds=None)
    assert "lacks SDXL's pooled embedding" in refusal(xl, cut=3, generic=without_pooled)
