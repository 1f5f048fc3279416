"""LoRA files: read by diffusers without a rest, spelled as other tools expect, and whole or refused."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_pipeline
from tiny_unets import make_tiny_conditioning
from torch import Tensor, nn

from hollow_core.errors import HollowError
from hollow_core.files import write_safetensors
from hollow_core.lora import file as lora_file
from hollow_core.lora.file import LoraFile
from hollow_core.lora.layers import (
    ALL_LAYERS,
    ATTENTION,
    add_lora,
    load_lora_state,
    lora_parameters,
    lora_state,
    named_lora_parameters,
    remove_lora,
)
from hollow_core.lora.metadata import Recipe
from hollow_core.nets.unet import hollow

RECIPE = Recipe(
    cut=1,
    identifier="sks",
    class_word="dog",
    personal_prompt="a photo of a sks dog",
    generic_prompt="a photo of a dog",
)
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
LINEAR = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "time_emb_proj",
)
TinyUNet = Callable[..., UNet2DConditionModel]


def random_lora(unet: nn.Module, rank: int = 4, targets: Sequence[str] = ATTENTION) -> dict[str, Tensor]:
    """A LoRA with the names and shapes of a trained one; no matrix is zero."""
    generator, state = torch.Generator().manual_seed(1), {}
    for path, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and path.endswith(tuple(targets)):
            out, *into = module.weight.shape
            state[f"{path}.lora_A.weight"] = torch.randn(rank, *into, generator=generator) * 0.1
            state[f"{path}.lora_B.weight"] = torch.randn(out, rank, *[1] * len(into[1:]), generator=generator) * 0.1
    return state


def weight_changes(state: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """ΔW = (alpha / rank) B A of each layer, as one would write it down."""
    changes = {}
    for key in state:
        if key.endswith("lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            down, up = state[key].float(), state[f"{module}.lora_B.weight"].float()
            change = up.flatten(1) @ down.flatten(1) * (alpha / len(down))
            changes[module] = change.reshape(len(up), *down.shape[1:])
    return changes


def save(path: Path, state: dict[str, Tensor], unet: nn.Module, layout: str, alpha: float = 4.0) -> Path:
    lora_file.save(path, state, unet.config, alpha=alpha, layout=layout, recipe=RECIPE)
    return path


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for module, change in expected.items():
        assert float((found[module] - change).norm()) <= 1e-3 * float(change.norm()), module


@pytest.mark.slow
@pytest.mark.parametrize("targets", [ATTENTION, (*LINEAR, *CONVOLUTIONS)], ids=["attention", "all layers"])
def test_diffusers_loads_it_with_nothing_left_over(
    tmp_path: Path, layout: str, targets: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """A plain pipeline takes every key, and each weight changes by the same ΔW within 1e-3, and no other."""
    pipeline = tiny_pipeline(layout)
    unet = pipeline.unet
    state = random_lora(hollow(unet, 1), targets=targets)
    path = save(tmp_path / "lora.safetensors", state, unet, layout, alpha=2.0)
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    with caplog.at_level("WARNING"):
        pipeline.load_lora_weights(path)
    loaded = {name.split(".lora_A")[0] for name, _ in unet.named_parameters() if ".lora_A" in name}
    assert loaded == set(weight_changes(state, 2.0))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    changed = {
        name.removesuffix(".weight"): weight - before[name]
        for name, weight in unet.state_dict().items()
        if not torch.equal(weight, before[name])
    }
    assert_close(changed, weight_changes(state, 2.0))
    # It does remark that the file holds nothing for the text encoders, which is true.
    assert all(record.message.startswith("No LoRA keys associated to CLIP") for record in caplog.records)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_round_trip(tmp_path: Path, layout: str, tiny_unet: TinyUNet, data: st.DataObject) -> None:
    """Any rank, alpha and set of layers comes back with the same ΔW."""
    rank, alpha = data.draw(st.integers(1, 9), "rank"), data.draw(st.floats(0.01, 1000), "alpha")
    unet = tiny_unet(layout)
    state = random_lora(unet, rank, targets=(*LINEAR, *CONVOLUTIONS, "conv_in", "conv_out"))
    modules = sorted(weight_changes(state, 1.0))
    kept = data.draw(st.sets(st.sampled_from(modules), min_size=1), "layers")
    state = {key: tensor for key, tensor in state.items() if key.rsplit(".lora_", 1)[0] in kept}

    loaded = lora_file.load(save(tmp_path / "lora.safetensors", state, unet, layout, alpha), unet)
    assert loaded.recipe == RECIPE
    assert loaded.alpha == pytest.approx(alpha, rel=1e-3)
    assert_close(weight_changes(loaded.state, loaded.alpha), weight_changes(state, alpha))


def peft_weight_changes(unet: nn.Module) -> dict[str, Tensor]:
    layers = {path: layer for path, layer in unet.named_modules() if isinstance(layer, LoraLayer)}
    return {path: layer.get_delta_weight("hollow").detach() for path, layer in layers.items()}


def test_a_trained_lora_comes_back_into_the_unet(tmp_path: Path, tiny_unet: TinyUNet, layout: str) -> None:
    """Out of peft's layers into a file, and from there into another U-Net: the same ΔW."""
    unet, other = tiny_unet(layout), tiny_unet(layout)
    generator = torch.Generator().manual_seed(1)
    add_lora(unet, 3, 5.0, generator=generator)
    for matrix in lora_parameters(unet):
        matrix.data.copy_(torch.randn(matrix.shape, generator=generator))
    loaded = lora_file.load(save(tmp_path / "a.safetensors", lora_state(unet), unet, layout, 5.0), unet)
    load_lora_state(other, loaded.state, loaded.alpha)
    assert_close(peft_weight_changes(other), peft_weight_changes(unet))


def test_every_tensor_is_half_contiguous_and_has_its_alpha(tmp_path: Path, tiny_unet: TinyUNet, layout: str) -> None:
    unet = tiny_unet(layout)
    state = {key: matrix.mT.contiguous().mT for key, matrix in random_lora(unet).items()}
    tensors = load_file(save(tmp_path / "lora.safetensors", state, unet, layout))
    assert all(tensor.dtype == torch.float16 and tensor.is_contiguous() for tensor in tensors.values())
    names = {key.split(".")[0] for key in tensors}
    assert tensors.keys() == {
        f"{name}.{part}" for name in names for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert all(float(tensors[f"{name}.alpha"]) == 4.0 for name in names)


def test_invokeai_recognises_the_base_model(tmp_path: Path, tiny_unet: TinyUNet) -> None:
    """It reads the width of the text from what attn2.to_k and to_v take in."""
    for layout, width in (("sd15", 768), ("sd21", 1024), ("sdxl", 2048)):
        unet = tiny_unet(layout, cross_attention_dim=width)
        tensors = load_file(save(tmp_path / "lora.safetensors", random_lora(hollow(unet, 1)), unet, layout))
        read = [tensor for key, tensor in tensors.items() if re.search("_attn2_to_[kv].lora_down", key)]
        assert {tensor.shape[1] for tensor in read} == {width}


def test_a1111_finds_every_layer_of_sdxl(tmp_path: Path, tiny_unet: TinyUNet) -> None:
    """It asks for "lora_unet_" and the original checkpoint's name with underscores, up to the first dot."""
    unet = tiny_unet("sdxl")
    names = {
        key.split(".", 1)[0] for key in load_file(save(tmp_path / "a.safetensors", random_lora(unet), unet, "sdxl"))
    }
    # Written down from the original U-Net's plan: in blocks 4, 5, 7 and 8, and out blocks 0 to 5, attend.
    depth = {
        "input_blocks_4": 2,
        "input_blocks_5": 2,
        "input_blocks_7": 3,
        "input_blocks_8": 3,
        "middle_block": 3,
    }
    depth |= {f"output_blocks_{i}": 3 if i < 3 else 2 for i in range(6)}
    assert names == {
        f"lora_unet_{block}_1_transformer_blocks_{i}_{attention}_{projection}"
        for block, blocks in depth.items()
        for i in range(blocks)
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_k", "to_v", "to_out_0")
    }


def test_sd15_is_spelled_in_diffusers_names(tmp_path: Path, tiny_unet: TinyUNet) -> None:
    unet = tiny_unet("sd15")
    tensors = load_file(save(tmp_path / "a.safetensors", random_lora(unet), unet, "sd15"))
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight" in tensors
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.alpha" in tensors


@pytest.mark.parametrize(
    ("layout", "prediction_type", "expected"),
    [
        ("sd15", "epsilon", ("sd_v1", "stable-diffusion-v1/lora", "epsilon", "False")),
        ("sd21", "epsilon", ("sd_v2", "stable-diffusion-v2-512/lora", "epsilon", "True")),
        ("sd21", "v_prediction", ("sd_v2", "stable-diffusion-v2-768-v/lora", "v", "True")),
        ("sdxl", "v_prediction", ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "v", "False")),
        ("other", "epsilon", (None, None, "epsilon", "False")),
        ("sd15", "sample", ("sd_v1", "stable-diffusion-v1/lora", None, "False")),  # the standard has no word for it
    ],
)
def test_metadata(
    tmp_path: Path,
    tiny_unet: TinyUNet,
    layout: str,
    prediction_type: str,
    expected: tuple[str | None, str | None, str | None, str],
) -> None:
    unet = tiny_unet("sdxl" if layout == "sdxl" else "sd15")
    path, recipe = tmp_path / "my dog.safetensors", RECIPE._replace(prediction_type=prediction_type, cut=None)
    state, extra = random_lora(unet, rank=3), {"hollow.steps": "1000"}
    lora_file.save(path, state, unet.config, alpha=1.5, layout=layout, recipe=recipe, metadata=extra)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    named = ("ss_base_model_version", "modelspec.architecture", "modelspec.prediction_type", "ss_v2")
    assert tuple(metadata.get(key) for key in named) == expected
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("3", "1.5")
    assert metadata["ss_output_name"] == metadata["modelspec.title"] == "my dog"
    assert metadata["modelspec.trigger_phrase"] == "sks dog"
    assert json.loads(metadata["ss_tag_frequency"]) == {"dog": {"sks dog": 1}}
    assert metadata["hollow.steps"] == "1000"
    assert lora_file.load(path, unet).recipe == recipe


def as_file(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


PLACE = "mid_block.attentions.0.transformer_blocks.0.attn1"
NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1"


def foreign(**alphas: float | None) -> dict[str, Tensor]:
    """A LoRA of another tool on some projections of the mid block, each of another rank and alpha."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for rank, (projection, alpha) in enumerate(alphas.items(), 2):
        tensors[f"{NAME}_{projection}.lora_down.weight"] = torch.randn(rank, 24, generator=generator)
        tensors[f"{NAME}_{projection}.lora_up.weight"] = torch.randn(24, rank, generator=generator)
        if alpha is not None:
            tensors[f"{NAME}_{projection}.alpha"] = torch.tensor(alpha)
    return tensors


def test_a_foreign_file_with_an_alpha_for_each_layer(tmp_path: Path, tiny_unet: TinyUNet) -> None:
    """kohya: a missing alpha, and an alpha of 0, stand for the rank."""
    tensors, unet = foreign(to_q=1.0, to_k=8.0, to_v=None, to_out_0=0.0), tiny_unet("sd15")
    loaded: LoraFile = lora_file.load(as_file(tmp_path, tensors), unet)
    assert loaded.recipe is None
    expected = {}
    for projection, scale in (("to_q", 1 / 2), ("to_k", 8 / 3), ("to_v", 1.0), ("to_out_0", 1.0)):
        up, down = (tensors[f"{NAME}_{projection}.lora_{side}.weight"] for side in ("up", "down"))
        expected[f"{PLACE}.{projection.replace('_0', '.0')}"] = up @ down * scale
    assert_close(weight_changes(loaded.state, loaded.alpha), expected)


def refusal(path: Path, unet: nn.Module) -> str:
    with pytest.raises(HollowError) as refused:
        lora_file.load(path, unet)
    return str(refused.value)


def test_a_lora_of_another_architecture_is_refused(tmp_path: Path, tiny_unet: TinyUNet) -> None:
    sd15, sd21, sdxl = (tiny_unet(layout) for layout in ("sd15", "sd21", "sdxl"))
    path = save(tmp_path / "sd15.safetensors", random_lora(sd15), sd15, "sd15")
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
    assert f"{key} has shape (4, 12), but this U-Net needs (4, 16). Use it with its own base" in refusal(path, sd21)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
    assert f"was made for another kind of model: {name} is no layer of this U-Net" in refusal(path, sdxl)
    path = save(tmp_path / "sdxl.safetensors", random_lora(sdxl), sdxl, "sdxl")
    assert "was made for another kind of model: lora_unet_input_blocks_4_1_" in refusal(path, sd15)


def test_damaged_files_are_refused(tmp_path: Path, tiny_unet: TinyUNet) -> None:
    unet = tiny_unet("sd15")
    path = save(tmp_path / "a.safetensors", random_lora(unet), unet, "sd15")
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "a.safetensors is not a whole safetensors file" in refusal(path, unet)
    assert "b.safetensors does not exist. Check the path" in refusal(tmp_path / "b.safetensors", unet)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({f"{NAME}_to_q.lora_up.weight": None}, f"lacks lora_up of {PLACE}.to_q, so it is no whole LoRA. Get"),
        (
            {f"{NAME}_to_q.lora_up.weight": torch.full((24, 2), float("nan"))},
            "holds infinite or undefined values in",
        ),
        ({f"{NAME}_to_q.dora_scale": torch.ones(24, 1)}, "is a DoRA without magnitudes for mid_block"),
        ({"lora_te_text_model_x.alpha": torch.ones(())}, "holds lora_te_text_model_x.alpha, part of a text encoder"),
        ({"lora_unet_x.lora_up.weight": torch.ones(1, 1)}, "lora_unet_x is no layer of this U-Net"),
    ],
)
def test_files_that_are_no_plain_lora_are_refused(
    tmp_path: Path, tiny_unet: TinyUNet, changes: dict[str, Tensor | None], sentence: str
) -> None:
    tensors = foreign(to_q=2.0, to_k=2.0) | changes
    path = as_file(tmp_path, {key: tensor for key, tensor in tensors.items() if tensor is not None})
    assert sentence in refusal(path, tiny_unet("sd15"))


def test_a_file_that_is_no_lora_is_refused(tmp_path: Path, tiny_unet: TinyUNet) -> None:
    path = as_file(tmp_path, {"conv_in.weight": torch.zeros(1)})
    assert "holds no LoRA of a U-Net. Choose a file with lora_unet_" in refusal(path, tiny_unet("sd15"))


def test_whoever_may_read_other_new_files_may_read_a_lora(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_safetensors(tmp_path / "lora.safetensors", {"numbers": torch.zeros(1)})
    assert (tmp_path / "lora.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_nothing_half_written(tmp_path: Path, tiny_unet: TinyUNet) -> None:
    """A LoRA that overflows in fp16, a name without the suffix, a folder that is a file: no file is left."""
    unet = tiny_unet("sd15")
    state = random_lora(unet)
    broken = state | {f"{PLACE}.to_q.lora_B.weight": torch.full((24, 4), 1e6)}
    with pytest.raises(HollowError, match=r"holds infinite or undefined values in \S+_to_q\.lora_up\.weight\. Lower"):
        save(tmp_path / "a.safetensors", broken, unet, "sd15")
    with pytest.raises(HollowError, match=r"The name 'a\.ckpt' does not end in \.safetensors"):
        save(tmp_path / "a.ckpt", state, unet, "sd15")
    (tmp_path / "file").touch()
    with pytest.raises(HollowError, match=r"could not be written .* Free some space or choose another folder"):
        save(tmp_path / "file" / "a.safetensors", state, unet, "sd15")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_a_dora_is_the_trained_one_in_every_dialect_and_in_diffusers(tmp_path: Path, layout: str) -> None:
    """Magnitudes stay fp32."""
    pipeline = tiny_pipeline(layout)
    unet: UNet2DConditionModel = pipeline.unet
    add_lora(unet, 4, 2.0, ALL_LAYERS, dora=True, generator=torch.Generator().manual_seed(0))
    for key, parameter in named_lora_parameters(unet).items():
        random = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        parameter.data = parameter.data * (1 + 0.1 * random) if "magnitude" in key else random * 0.2
    state, trained = lora_state(unet), predict(unet)
    remove_lora(unet)
    first = tmp_path / "a.safetensors"
    written = lora_file.save(first, state, unet.config, alpha=2.0, layout=layout, recipe=RECIPE)
    assert re.search(r"a DoRA, the largest \|ΔW\| before its magnitudes is 0\.\d+\.$", written.sentence)
    with safe_open(first, "pt") as file:
        told = file.metadata()
    assert told["ss_network_module"] == "lycoris.kohya"
    assert json.loads(told["ss_network_args"])["dora_wd"] == "True"
    config = dict(unet.config)
    source = first
    for dialect in ("diffusers", "peft", "comfy", "kohya"):
        target = tmp_path / ("peft" if dialect == "peft" else f"{dialect}.safetensors")
        lora_file.convert(source, target, dialect, config=config)
        loaded = lora_file.load(target, unet)
        magnitudes = {key for key in state if "magnitude" in key}
        assert loaded.state.keys() == state.keys()
        assert all(torch.equal(loaded.state[key], state[key]) for key in magnitudes)
        load_lora_state(unet, loaded.state, loaded.alpha)
        assert (predict(unet) - trained).abs().max() < 5e-3 * trained.abs().max(), dialect
        remove_lora(unet)
        source = target
    pipeline.load_lora_weights(tmp_path / "diffusers.safetensors")
    assert (predict(unet) - trained).abs().max() < 5e-3 * trained.abs().max()
    pipeline.unload_lora_weights()
    assert (predict(unet) - trained).abs().max() > 0.05 * trained.abs().max()


def predict(unet: UNet2DConditionModel) -> Tensor:
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet(latents, 9, **make_tiny_conditioning(unet).kwargs()).sample
