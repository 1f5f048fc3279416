"""LoRA files of transformers: what is written is read back, by us, by diffusers and, where it can, by others."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft.tuners.lora import LoraLayer as PeftLayer
from tiny_transformers import FAMILY_NAMES, tiny_transformer
from torch import Tensor

from hollow_core.errors import HollowError
from hollow_core.lora import dialects
from hollow_core.lora import file as lora_file
from hollow_core.lora.delta import LoraLayer
from hollow_core.lora.dialects import weight_shapes
from hollow_core.lora.file import config_of, write_dialect
from hollow_core.lora.layers import add_lora, lora_state, named_lora_parameters, remove_lora
from hollow_core.lora.metadata import layout_of, recipe_for
from hollow_core.models.layouts import TRANSFORMERS, transformer_config
from hollow_core.nets.families import FAMILIES, family_of
from hollow_core.nets.transformer import Transformer

DIALECTS = [(family.name, dialect) for family in FAMILIES.values() for dialect in family.dialects]

RECIPE = recipe_for((1, 1), "sks", "dog", "flow")


def trained(network: Transformer, rank: int = 2, alpha: float = 3.0, *, everywhere: bool = False) -> dict[str, Tensor]:
    """A LoRA as training leaves it, on what is left at (1, 1)."""
    hollowed, generator = network.hollow((1, 1), None), torch.Generator().manual_seed(0)
    targets = network.family.attention + (network.family.feed_forward if everywhere else ())
    add_lora(hollowed.module, rank, alpha, targets, within=hollowed.within, generator=generator)
    for matrix in named_lora_parameters(hollowed.module).values():
        matrix.data.normal_(0, 0.3, generator=generator)
    state = lora_state(hollowed.module)
    remove_lora(hollowed.module)
    return state


def changes(state: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """{layer: ΔW}"""
    return {
        key.removesuffix(".lora_A.weight"): alpha / len(down) * state[key.replace("lora_A", "lora_B")] @ down
        for key, down in state.items()
        if key.endswith("lora_A.weight")
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-3) -> None:
    assert found.keys() == expected.keys()
    for module, change in expected.items():
        assert float((found[module] - change).norm()) <= tolerance * float(change.norm()), module


def pipeline_with(network: Transformer) -> Any:
    """The family's own, of the transformer alone."""
    kind = getattr(diffusers, network.family.pipelines[0])
    if issubclass(kind, diffusers.ModularPipeline):
        pipeline = kind()
        pipeline.update_components(transformer=network.module)
        return pipeline
    parameters = list(inspect.signature(kind).parameters.values())
    needed = {parameter.name: None for parameter in parameters if parameter.default is parameter.empty}
    return kind(**needed | {"transformer": network.module})


@pytest.mark.parametrize(("name", "dialect"), DIALECTS)
def test_what_is_written_is_read_back(tmp_path: Path, name: str, dialect: str) -> None:
    network = tiny_transformer(name)
    state = trained(network, everywhere=True)
    first = tmp_path / "first.safetensors"
    written = lora_file.save(first, state, network.config, alpha=3.0, layout="any", recipe=RECIPE)
    assert written.dialect == network.family.dialects[0]
    assert f"layers of {network.family.title}, every key matched; the largest |ΔW| is" in written.sentence
    path = tmp_path / ("a" if dialect == "peft" else "a.safetensors")
    again = lora_file.convert(first, path, dialect, config=network.config)
    assert again.layers == written.layers == len(changes(state, 3.0))
    assert again.largest == pytest.approx(written.largest, rel=1e-2)
    loaded = lora_file.load(path, network.module)
    assert_same(changes(loaded.state, loaded.alpha), changes(state, 3.0))
    assert loaded.recipe == RECIPE
    assert layout_of(loaded.metadata) == name


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_diffusers_takes_every_key_of_what_is_saved(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    network = tiny_transformer(name)
    state = trained(network, everywhere=True)
    path = tmp_path / "a.safetensors"
    lora_file.save(path, state, network.config, alpha=3.0, layout="any", recipe=RECIPE)
    pipeline = pipeline_with(network)
    with caplog.at_level("WARNING"):
        caplog.clear()
        pipeline.load_lora_weights(path)
    found = {
        path: layer.get_delta_weight(layer.active_adapters[0]).detach()
        for path, layer in network.module.named_modules()
        if isinstance(layer, PeftLayer)
    }
    assert_same(found, changes(state, 3.0))
    assert all(record.message.startswith("No LoRA keys associated to NoneType") for record in caplog.records)


def test_kohyas_flux_names_are_read_by_diffusers() -> None:
    """Queries, keys and values in one layer, each with ranks of its own: the same ΔW in the converter of diffusers.
    One that has no LoRA, the feed-forward half of the joined layer, stays as it is."""
    config = transformer_config("flux") | {"num_layers": 1, "num_single_layers": 1}
    family, generator = family_of(config["_class_name"]), torch.Generator().manual_seed(0)
    layers = {
        module: LoraLayer(torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator), 3.0)
        for module, (out, into) in weight_shapes(config).items()
        if "blocks.0." in module and module.endswith((*family.attention, "ff.net.2"))
    }
    file = dialects.spell(layers, {}, config, "kohya", ldm=False)
    assert {key.split(".")[0] for key in file} == {
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_double_blocks_0_img_attn_proj",
        "lora_unet_double_blocks_0_txt_attn_qkv",
        "lora_unet_double_blocks_0_txt_attn_proj",
        "lora_unet_double_blocks_0_img_mlp_2",
        "lora_unet_single_blocks_0_linear1",
    }
    assert len(file["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"]) == 6
    found = diffusers.FluxPipeline.lora_state_dict(dict(file))
    seen = torch.randn(3072 * 4, 3, generator=generator)
    for module, layer in layers.items():
        down, up = (found.pop(f"transformer.{module}.lora_{side}.weight") for side in "AB")
        given = seen[: down.shape[1]]
        expected = layer.scale * layer.up @ (layer.down @ given)
        assert torch.allclose(up @ (down @ given), expected, rtol=1e-3, atol=1e-2), module
    assert found.keys() == {f"transformer.single_transformer_blocks.0.proj_mlp.lora_{side}.weight" for side in "AB"}
    assert not found["transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight"].any()
    again = dialects.parse(file, config)
    assert again.dialect == "kohya"
    assert again.layers.keys() == layers.keys()
    assert all(torch.equal(again.layers[module].up, layer.up) for module, layer in layers.items())


def test_a_layer_that_trainers_put_together_is_read_as_its_parts() -> None:
    """kohya's FLUX and ComfyUI's Z-Image have one LoRA on queries, keys and values: written again it is the same."""
    config = tiny_transformer("flux").config
    down, up = torch.randn(4, 16), torch.randn(48, 4)
    name = "lora_unet_double_blocks_1_txt_attn_qkv"
    file = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    found = dialects.parse(file, config)
    assert [module.rsplit(".", 1)[1] for module in found.layers] == ["add_q_proj", "add_k_proj", "add_v_proj"]
    assert torch.equal(torch.cat([layer.up for layer in found.layers.values()]), up)
    again = dialects.spell(found.layers, {}, config, "kohya", ldm=False)
    assert again.keys() == file.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in file.items())
    z_image = {"diffusion_model.layers.0.attention.qkv.lora_A.weight": down}
    z_image["diffusion_model.layers.0.attention.qkv.lora_B.weight"] = up
    found = dialects.parse(z_image, tiny_transformer("z-image").config)
    assert list(found.layers) == [f"layers.0.attention.{name}" for name in ("to_q", "to_k", "to_v")]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    network, other = tiny_transformer("krea2"), tiny_transformer("anima")
    path = tmp_path / "a.safetensors"
    lora_file.save(path, trained(network), network.config, alpha=3.0, layout="any", recipe=RECIPE)
    with pytest.raises(HollowError, match=r"another kind of model: diffusion_model\.blocks.* is no layer of Anima"):
        lora_file.load(path, other.module)
    wide = {"diffusion_model.blocks.0.attn.wq.lora_A.weight": torch.ones(2, 99)}
    wide["diffusion_model.blocks.0.attn.wq.lora_B.weight"] = torch.ones(16, 2)
    with pytest.raises(HollowError, match=r"has shape \(2, 99\), but Krea 2 needs \(2, 16\)"):
        dialects.parse(wide, network.config)
    with pytest.raises(HollowError, match=r"holds no LoRA of Krea 2\. Choose a file with diffusion_model\.… keys"):
        dialects.parse({"x": torch.ones(1)}, network.config)
    flux = tiny_transformer("flux")
    sentence = r"FLUX\.1 has no LoRA files in the dialect comfy\. Choose one of diffusers, kohya, peft"
    with pytest.raises(HollowError, match=sentence):
        write_dialect(path, dialects.parse(*spelled(flux)), flux.config, {}, dialect="comfy")


def spelled(network: Transformer) -> tuple[dict[str, Tensor], Any]:
    """A LoRA as peft spells it, and what it is for."""
    return {f"transformer.{key}": matrix for key, matrix in trained(network).items()}, network.config


def test_a_dora_is_refused_as_comfyui_and_diffusers_spell_magnitudes_differently(tmp_path: Path) -> None:
    network = tiny_transformer("flux")
    lora = dialects.parse(*spelled(network))
    ones = {module: layer._replace(dora_scale=torch.ones(len(layer.up))) for module, layer in lora.layers.items()}
    with pytest.raises(HollowError, match=r"A DoRA of FLUX\.1 has no spelling that ComfyUI and diffusers both read"):
        write_dialect(tmp_path / "a.safetensors", lora._replace(layers=ones), network.config, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"ss_base_model_version": "flux1"}, "flux"),
        ({"ss_base_model_version": "flux.1"}, "flux"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "flux"),
        ({"ss_base_model_version": "zimage"}, "z-image"),
        ({"modelspec.architecture": "Qwen-Image/lora"}, "qwen-image"),
        ({"modelspec.architecture": "stable-diffusion-3-5-large/lora"}, "sd3"),
        ({"modelspec.architecture": "Krea-2/lora"}, "krea2"),
        ({"ss_base_model_version": "anima"}, "anima"),
    ],
)
def test_the_family_is_told_by_the_metadata(metadata: dict[str, str], name: str) -> None:
    assert layout_of(metadata) == name


@pytest.mark.slow
@pytest.mark.parametrize("layout", TRANSFORMERS)
def test_the_public_model_is_told_by_names_and_shapes(layout: str) -> None:
    """Of a file that says nothing, in every dialect; another size is asked for."""
    config = transformer_config(layout)
    family = family_of(config["_class_name"])
    ends = (*family.attention, *family.feed_forward)
    layers = {
        module: LoraLayer(torch.zeros(1).expand(1, into), torch.zeros(1).expand(out, 1), 1.0)
        for module, (out, into) in (
            (m, s) for m, s in weight_shapes(config).items() if "s.1." in m and m.endswith(ends)
        )
    }
    for dialect in family.dialects:
        file = dialects.spell(layers, {}, config, dialect, ldm=False)
        shapes = {key: tuple(tensor.shape) for key, tensor in file.items()}
        assert config_of({}, shapes) == config, dialect
        assert config_of({}, dialects.parse(file, config).shapes) == config, dialect
    wide = dict.fromkeys(shapes, (2, 100))
    with pytest.raises(HollowError, match="of another size than the public model"):
        config_of({"modelspec.architecture": f"{family.architecture}/lora"}, wide)
