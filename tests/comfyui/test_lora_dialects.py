"""ComfyUI's own loader on the dialects that are meant for it: nothing is left over, and each weight changes by ΔW."""

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("comfy", reason="COMFYUI_DIR names no checkout of ComfyUI")

import comfy.lora
import comfy.sd
import comfy.utils
import torch
from tiny_models import tiny_model, tiny_unet

from hollow_core.analysis.change import measure
from hollow_core.lora.delta import LoraLayer
from hollow_core.lora.dialects import Lora, spell, weight_shapes
from hollow_core.lora.file import load, write_dialect
from hollow_core.nets.unet_layers import to_ldm


def random_layer(out: int, into: list[int], number: int, generator: torch.Generator) -> LoraLayer:
    rank = 1 + number % 3
    up = torch.randn(out, rank, *[1] * (len(into) - 1), generator=generator)
    return LoraLayer(torch.randn(rank, *into, generator=generator), up, float(1 + number % 5))


@pytest.mark.parametrize("dialect", ["kohya", "comfy"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_comfyui_changes_every_weight_by_what_the_file_says(name: str, dialect: str, tmp_path: Path) -> None:
    config, generator = tiny_unet(name).config, torch.Generator().manual_seed(0)
    shapes = weight_shapes(config)
    layers = {
        module: random_layer(out, into, number, generator)
        for number, (module, (out, *into)) in enumerate(shapes.items())
    }
    lora = Lora("kohya", layers, {}, ())
    path = write_dialect(tmp_path / "a.safetensors", lora, config, {}, dialect=dialect, dtype=torch.float32).path
    model, file = tiny_model(name), comfy.utils.load_torch_file(str(path))
    patches = comfy.lora.load_lora(file, comfy.lora.model_lora_keys_unet(model.model, {}))
    assert {key for patch in patches.values() for key in patch.loaded_keys} == file.keys()
    patched, _ = comfy.sd.load_lora_for_models(model, None, file, 1.0, 1.0)
    weights = model.model.state_dict()
    for module, layer in layers.items():
        key = f"diffusion_model.{to_ldm(config, module)}.weight"
        change = layer.scale * (layer.up.flatten(1) @ layer.down.flatten(1)).reshape(weights[key].shape)
        found = comfy.lora.calculate_weight(patched.patches[key], weights[key].clone(), key)
        assert torch.allclose(found, weights[key] + change, atol=1e-4), module
    assert len(patched.patches) == len(layers)


@pytest.mark.parametrize("dialect", ["kohya", "comfy"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_comfyui_sets_a_doras_magnitudes_but_for_what_its_norm_is_of(name: str, dialect: str, tmp_path: Path) -> None:
    """It computes m (W + ΔW) / ‖W‖, where LyCORIS, peft and we have ‖W + ΔW‖, so each output is ‖W + ΔW‖ / ‖W‖ times as
    long: see its pull request 15458. Where it is fixed, the factor is 1."""
    unet, generator = tiny_unet(name), torch.Generator().manual_seed(0)
    weights = {module: unet.get_submodule(module).weight.detach() for module in weight_shapes(unet.config)}
    norms = {module: weight.flatten(1).norm(dim=1) for module, weight in weights.items()}
    layers = {
        module: random_layer(len(weight), list(weight.shape[1:]), number, generator)._replace(
            dora_scale=norms[module] * (1 + 0.2 * torch.rand(len(weight), generator=generator))
        )
        for number, (module, weight) in enumerate(weights.items())
    }
    lora = Lora("kohya", layers, {}, ())
    path = write_dialect(tmp_path / "a.safetensors", lora, unet.config, {}, dialect=dialect, dtype=torch.float32).path
    patched, _ = comfy.sd.load_lora_for_models(tiny_model(name), None, comfy.utils.load_torch_file(str(path)), 1.0, 1.0)
    for module, layer in layers.items():
        key, weight = f"diffusion_model.{to_ldm(unet.config, module)}.weight", weights[module]
        changed = weight.flatten(1) + layer.scale * layer.up.flatten(1) @ layer.down.flatten(1)
        found = comfy.lora.calculate_weight(patched.patches[key], weight.clone(), key).flatten(1)
        lengths = changed.norm(dim=1)
        ours = changed * (layer.dora_scale / lengths)[:, None]
        theirs = ours * (lengths / norms[module])[:, None]
        same = [torch.allclose(found, expected, rtol=1e-4, atol=1e-4) for expected in (ours, theirs)]
        assert any(same), module
    assert len(patched.patches) == len(layers)


@pytest.mark.parametrize("dialect", ["kohya", "comfy"])
def test_comfyui_brings_each_input_to_its_magnitude(dialect: str, tmp_path: Path) -> None:
    """As we measure it."""
    unet, generator = tiny_unet("sd15"), torch.Generator().manual_seed(0)
    weights = {module: unet.get_submodule(module).weight.detach().clone() for module in weight_shapes(unet.config)}
    layers = {
        module: random_layer(len(weight), list(weight.shape[1:]), number, generator)._replace(
            dora_scale=weight.transpose(0, 1).flatten(1).norm(dim=1)[None] * 1.2
        )
        for number, (module, weight) in enumerate(weights.items())
    }
    lora = Lora("kohya", layers, {}, ())
    path = write_dialect(tmp_path / "a.safetensors", lora, unet.config, {}, dialect=dialect, dtype=torch.float32).path
    patched, _ = comfy.sd.load_lora_for_models(
        tiny_model("sd15"), None, comfy.utils.load_torch_file(str(path)), 1.0, 1.0
    )
    loaded = load(path, unet)
    for module, weight in weights.items():
        key = f"diffusion_model.{to_ldm(unet.config, module)}.weight"
        found = comfy.lora.calculate_weight(patched.patches[key], weight.clone(), key)
        measured = measure(layers[module], weight)
        assert measured.mean == pytest.approx((found - weight).abs().mean().item(), rel=1e-3), module
        assert torch.equal(loaded.state[f"{module}.lora_magnitude_vector.weight"], layers[module].dora_scale)
    assert len(patched.patches) == len(layers)


@pytest.mark.parametrize("dialect", ["kohya", "comfy"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_comfyui_finds_the_text_encoders(name: str, dialect: str) -> None:
    clips = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"} if name == "sdxl" else {"text_encoder": "clip_l"}
    place = "text_model.encoder.layers.0"
    ours = [f"{place}.{layer}" for layer in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")]
    theirs = {f"{clip}.transformer.{layer}.weight": torch.zeros(4, 4) for clip in clips.values() for layer in ours}
    layer = LoraLayer(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    text = {f"{encoder}.{inner}": layer for encoder in clips for inner in ours}
    file = spell({}, text, tiny_unet(name).config, dialect, ldm=name == "sdxl")
    known = comfy.lora.model_lora_keys_clip(SimpleNamespace(state_dict=lambda: theirs), {})
    patches = comfy.lora.load_lora(file, known)
    assert patches.keys() == theirs.keys()
    assert {key for patch in patches.values() for key in patch.loaded_keys} == file.keys()
