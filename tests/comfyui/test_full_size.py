"""The shapes of the public models: names and sizes of every weight, and a whole Stable Diffusion 1.5."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("comfy", reason="COMFYUI_DIR names no checkout of ComfyUI")

import comfy.lora
import comfy.model_detection
import comfy.sample
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from diffusers import UNet2DConditionModel
from full_models import save_full_checkpoint
from hollow_pack.nodes.handles import HollowLora
from hollow_pack.nodes.host.two_path import two_path_model
from hollow_pack.nodes.host.unet import diffusers_unet, layout, unet_config
from torch import Tensor
from two_path_reference import Reference

from hollow_core.lora import file as lora_file
from hollow_core.lora.layers import ALL_LAYERS, add_lora, lora_parameters, lora_state
from hollow_core.lora.metadata import Recipe, describe
from hollow_core.models.layouts import layout_config
from hollow_core.nets.unet import hollow
from hollow_core.nets.unet_layers import to_ldm

CPU = torch.device("cpu")


def empty_model(name: str) -> tuple[ModelPatcher, UNet2DConditionModel]:
    """What ComfyUI makes of a checkpoint of these shapes, and what diffusers makes of them; neither holds a byte."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(layout_config(name))
        weights = {to_ldm(unet.config, key): weight for key, weight in unet.state_dict().items()}
        config = comfy.model_detection.model_config_from_unet(weights, "")
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, device=torch.device("meta"))
        model.diffusion_model.load_state_dict(weights, assign=True)  # under dynamic VRAM layers have no weights before
        assert {key: weight.shape for key, weight in model.diffusion_model.state_dict().items()} == {
            key: weight.shape for key, weight in weights.items()
        }
    return ModelPatcher(model, CPU, CPU), unet


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_every_weight_has_its_name_and_shape_in_diffusers(name: str) -> None:
    model, unet = empty_model(name)
    ours = diffusers_unet(model)
    assert {key: weight.shape for key, weight in ours.state_dict().items()} == {
        key: weight.shape for key, weight in unet.state_dict().items()
    }
    assert layout(model) == name
    said = unet_config(model)
    assert {key: ours.config[key] for key in said} == dict(said)
    heads = [module.heads for module in unet.modules() if hasattr(module, "heads")]
    assert [module.heads for module in ours.modules() if hasattr(module, "heads")] == heads  # no weight tells


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_comfyui_finds_a_layer_for_every_key_of_a_lora(name: str) -> None:
    model, unet = empty_model(name)
    part = hollow(unet, 1, timesteps=None)
    there = [target for target in ALL_LAYERS if any(path.endswith(target) for path, _ in part.named_modules())]
    state: dict[str, Tensor] = {}
    for path, module in part.named_modules():
        if any(path.endswith(f".{target}") for target in there):
            state[f"{path}.lora_A.weight"] = torch.zeros(2, *module.weight.shape[1:])
            state[f"{path}.lora_B.weight"] = torch.zeros(module.weight.shape[0], 2, *[1] * (module.weight.dim() - 2))
    file = lora_file.to_kohya(state, unet.config, alpha=2.0, layout=name)
    patches = comfy.lora.load_lora(file, comfy.lora.model_lora_keys_unet(model.model, {}))
    assert len(patches) == len(state) // 2
    assert {key for patch in patches.values() for key in patch.loaded_keys} == file.keys()
    weights = model.model.state_dict()
    for key, patch in patches.items():
        up, down = patch.weights[:2]
        assert (up.shape[0], *down.shape[1:]) == weights[key].shape, key


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelPatcher]:
    """As ComfyUI's Load Checkpoint gives it."""
    path = tmp_path_factory.mktemp("checkpoint") / "sd15.safetensors"
    save_full_checkpoint(path, "sd15")
    with torch.inference_mode():
        yield comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]


@pytest.fixture(scope="module")
def lora(sd15: ModelPatcher, tmp_path_factory: pytest.TempPathFactory) -> HollowLora:
    """One that changes much."""
    with torch.inference_mode(False):
        unet, generator = diffusers_unet(sd15), torch.Generator().manual_seed(1)
        part = hollow(unet, 3, timesteps=None)
        add_lora(part, 4, generator=generator)
        for matrix in lora_parameters(part):
            matrix.data.copy_(torch.randn(matrix.shape, generator=generator) / 30)
        recipe = Recipe(3, "sks", "dog", "a photo of a sks dog", "a photo of a dog")
        state = lora_file.to_kohya(lora_state(part), unet.config, alpha=4.0, layout="sd15")
        return HollowLora(state, recipe, describe("lora", "sd15", 4, 4.0, recipe))


def prompt(seed: int) -> list[list[Any]]:
    return [[torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(seed)), {"pooled_output": None}]]


@torch.inference_mode()
def draw(model: ModelPatcher, positive: list[list[Any]]) -> Tensor:
    latents = torch.zeros(1, 4, 16, 16)
    noise = comfy.sample.prepare_noise(latents, seed=0)
    return comfy.sample.sample(
        model, noise, 2, 4.0, "euler", "normal", positive, prompt(3), latents, disable_pbar=True, seed=0
    )


def test_at_strength_0_sd15_on_two_paths_is_sd15(sd15: ModelPatcher, lora: HollowLora) -> None:
    two_paths = two_path_model(sd15, lora, prompt(2), strength=0.0)
    assert torch.equal(draw(two_paths, prompt(2)), draw(sd15, prompt(2)))


def test_sd15_on_two_paths_is_what_the_library_predicts(sd15: ModelPatcher, lora: HollowLora, tmp_path: Path) -> None:
    ours = draw(two_path_model(sd15, lora, prompt(2)), prompt(1))
    with torch.inference_mode(False):
        reference = Reference(diffusers_unet(sd15), lora, tmp_path, prompt(2))
    theirs = draw(reference.patched(sd15), prompt(1))
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()
    assert (ours - draw(sd15, prompt(1))).abs().max() > 1e-2 * theirs.abs().max()
