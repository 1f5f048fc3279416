"""The embedded model as ComfyUI's MODEL, CLIP and VAE: it computes what diffusers computes from the same files."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("comfy", reason="COMFYUI_DIR names no checkout of ComfyUI")

import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.utils
import latent_preview
from diffusers import DDPMScheduler
from hollow_pack.nodes.host.demo import demo_images, demo_model
from hollow_pack.nodes.host.unet import noise_schedule

import nodes
from hollow_core.data.images import load_images
from hollow_core.demo import run, world
from hollow_core.lora import file as lora_file
from hollow_core.lora import layers as lora
from hollow_core.lora.metadata import Recipe
from hollow_core.models.base_model import BaseModel, encode_images, encode_prompt
from hollow_core.nets.schedule import NoiseSchedule
from hollow_core.sampling.sample import SampleSettings, sample

PROMPT = "a photo of a sks cup on the grass"


class Demo(NamedTuple):
    model: Any
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE


@pytest.fixture(scope="module")
def demo() -> Demo:
    with torch.inference_mode():  # as ComfyUI runs nodes
        return Demo(*demo_model())


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return run.model()


def random_latents(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 8, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def denoised(model: Any, noisy: torch.Tensor, timestep: int, context: torch.Tensor) -> torch.Tensor:
    """What the MODEL, once loaded, takes for the clean latents of `noisy`, which lie on diffusers' scale."""
    sigma = model.model.model_sampling.sigmas[timestep : timestep + 1].expand(len(noisy))
    scaled = noisy * (sigma**2 + 1).sqrt().view(-1, 1, 1, 1)
    return model.model.apply_model(scaled, sigma, c_crossattn=context, transformer_options={})


@torch.no_grad()
def expected(base: BaseModel, noisy: torch.Tensor, timestep: int, context: torch.Tensor) -> torch.Tensor:
    alpha = base.schedule.numbers[timestep].clamp(min=4.9e-8)  # what ComfyUI calls zero
    velocity = base.unet(noisy, timestep, context).sample
    return alpha.sqrt() * noisy - (1 - alpha).sqrt() * velocity


def test_the_noise_schedule_is_the_one_of_training(demo: Demo, base: BaseModel) -> None:
    sigmas = demo.model.get_model_object("model_sampling").sigmas
    torch.testing.assert_close(1 / (sigmas**2 + 1), base.schedule.numbers, rtol=0, atol=1e-6)


def test_stores_go_by_the_schedule_that_a_diffusers_scheduler_has(demo: Demo) -> None:
    """To the last bit, as they always did: a store on a user's disk is found again."""
    schedule = noise_schedule(demo.model)
    sigmas = demo.model.get_model_object("model_sampling").sigmas.double()
    cumulated = torch.cat([torch.ones(1).double(), 1 / (sigmas**2 + 1)])
    betas = (1 - cumulated[1:] / cumulated[:-1]).float().tolist()
    scheduler = DDPMScheduler(trained_betas=betas, prediction_type="v_prediction")
    assert schedule.id == NoiseSchedule.from_scheduler(scheduler).id


def test_the_unet_predicts_what_diffusers_predicts(demo: Demo, base: BaseModel) -> None:
    comfy.model_management.load_models_gpu([demo.model])
    noisy, context = random_latents(2), encode_prompt(base, PROMPT).encoder_hidden_states.repeat(2, 1, 1)
    for timestep in (0, 250, 500, 750, 999):
        ours = denoised(demo.model, noisy, timestep, context)
        torch.testing.assert_close(ours, expected(base, noisy, timestep, context), rtol=0, atol=1e-4)


def test_odd_latent_sizes_pass_through_the_unet(demo: Demo, base: BaseModel) -> None:
    comfy.model_management.load_models_gpu([demo.model])
    noisy, context = random_latents()[..., :13, :10], encode_prompt(base, PROMPT).encoder_hidden_states
    ours = denoised(demo.model, noisy, 500, context)
    torch.testing.assert_close(ours, expected(base, noisy, 500, context), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_weights_may_stay_offloaded(demo: Demo, base: BaseModel) -> None:
    comfy.model_management.unload_all_models()
    demo.model.load(demo.model.load_device, lowvram_model_memory=1)  # as with --novram
    noisy, context = random_latents(), encode_prompt(base, PROMPT).encoder_hidden_states
    try:
        assert demo.model.model.model_lowvram
        ours = denoised(demo.model, noisy, 500, context)
    finally:
        demo.model.detach()
    torch.testing.assert_close(ours, expected(base, noisy, 500, context), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "prompt", ["", PROMPT, "A drawing of a Blue robot, wearing a crown?", "zyx " + "the red cat and " * 4]
)
@torch.inference_mode()
def test_embeddings_are_those_of_diffusers(demo: Demo, base: BaseModel, prompt: str) -> None:
    [[embeds, _]] = nodes.CLIPTextEncode().encode(demo.clip, prompt)[0]
    torch.testing.assert_close(embeds, encode_prompt(base, prompt).encoder_hidden_states, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_a_prompt_too_long_for_one_window_takes_two(demo: Demo) -> None:
    [[embeds, extra]] = nodes.CLIPTextEncode().encode(demo.clip, "a photo of a cup and " * 6)[0]
    assert embeds.shape == (1, 48, 96)
    assert embeds.isfinite().all()
    assert extra["pooled_output"].isfinite().all()


def test_the_sample_is_that_of_hollow_demo(tmp_path: Path) -> None:
    run.write_references(tmp_path, world.HELD_OUT[0])
    images, captions = demo_images()
    assert all(image.shape == (1, 64, 64, 3) for image in images)
    written = {item.caption: world.to_tensor([item.picture]) for item in load_images(tmp_path, world.SIZE)}
    assert set(captions) == set(written)
    for image, caption in zip(images, captions, strict=True):
        torch.testing.assert_close(image.movedim(-1, 1) * 2 - 1, written[caption])


@torch.inference_mode()
def test_the_vae_encodes_and_decodes_as_diffusers_does(demo: Demo, base: BaseModel, tmp_path: Path) -> None:
    images, captions = demo_images()
    latents = nodes.VAEEncode().encode(demo.vae, torch.cat(images))[0]
    run.write_references(tmp_path, world.HELD_OUT[0])
    references = {item.caption: item for item in load_images(tmp_path, world.SIZE)}
    torch.testing.assert_close(
        latents["samples"], torch.cat(encode_images(base, [references[caption] for caption in captions]))
    )
    decoded = nodes.VAEDecode().decode(demo.vae, latents)[0]
    assert base.vae is not None
    theirs = base.vae.decode(latents["samples"]).sample.clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(decoded, theirs.movedim(1, -1), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_the_vae_works_in_tiles(demo: Demo) -> None:
    latents = random_latents()
    tiled = nodes.VAEDecodeTiled().decode(demo.vae, {"samples": latents}, tile_size=64, overlap=0)[0]
    assert tiled.shape == demo.vae.decode(latents).shape == (1, 64, 64, 3)


@torch.inference_mode()
def test_previews_show_the_colours_of_the_picture(demo: Demo) -> None:
    latent_format = demo.model.get_model_object("latent_format")
    previewer = latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    )
    image = demo_images()[0][2]
    preview = previewer.decode_latent_to_preview(demo.vae.encode(image))
    wanted = torch.nn.functional.avg_pool2d(image.movedim(-1, 1), demo.vae.downscale_ratio)
    assert preview.size == (16, 16)
    assert (world.to_tensor([preview]) / 2 + 0.5 - wanted).abs().mean() < 0.03


@torch.inference_mode()
def test_the_built_in_nodes_draw_what_hollow_draws(demo: Demo, base: BaseModel) -> None:
    encode = nodes.CLIPTextEncode().encode
    positive, negative = (encode(demo.clip, prompt)[0] for prompt in (PROMPT, ""))
    empty = nodes.EmptyLatentImage().generate(128, 128)[0]
    latents = nodes.KSampler().sample(demo.model, 3, 10, 3.0, "euler", "sgm_uniform", positive, negative, empty)[0]
    drawn = nodes.VAEDecode().decode(demo.vae, latents)[0]
    settings = SampleSettings(steps=10, guidance=3.0)
    wanted = world.to_tensor(sample(base, [PROMPT], [3], settings)) / 2 + 0.5
    assert drawn.shape == (1, 64, 64, 3)
    assert drawn.isfinite().all()
    assert (drawn.movedim(-1, 1) - wanted).abs().mean() < 0.02


def test_a_saved_lora_loads_with_nothing_left_over(
    demo: Demo, base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generator = torch.Generator().manual_seed(0)
    lora.add_lora(base.unet, 2, targets=run.SETTINGS.targets, generator=generator)
    shapes = {key: matrix.shape for key, matrix in lora.lora_state(base.unet).items()}
    state = {key: torch.randn(shape, generator=generator).mul(0.1).half().float() for key, shape in shapes.items()}
    lora.load_lora_state(base.unet, state, alpha=2)
    noisy, context = random_latents(), encode_prompt(base, PROMPT).encoder_hidden_states
    personal = expected(base, noisy, 500, context)
    lora.remove_lora(base.unet)
    generic = expected(base, noisy, 500, context)
    assert (personal - generic).abs().mean() > 0.01

    recipe = Recipe(3, "sks", "cup", PROMPT, "a photo of a cup", "v_prediction")
    path = tmp_path / "lora.safetensors"
    lora_file.save(path, state, base.unet.config, alpha=2, layout="other", recipe=recipe)
    weights = comfy.utils.load_torch_file(str(path))
    with caplog.at_level(logging.WARNING):
        patched, _ = comfy.sd.load_lora_for_models(demo.model, demo.clip, weights, 1.0, 1.0)
    assert not caplog.messages  # "lora key not loaded: …", "NOT LOADED …"
    assert len(patched.patches) == len(state) / 2
    for model, wanted in ((patched, personal), (demo.model, generic)):
        comfy.model_management.load_models_gpu([model])
        torch.testing.assert_close(denoised(model, noisy, 500, context), wanted, rtol=0, atol=1e-4)
