"""Every dialect into every other with the same ΔW; each tool finds a layer for each key; files of others are read."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_pipelines import tiny_pipeline
from tiny_unets import make_tiny_unet
from torch import Tensor

from hollow_core.errors import HollowError
from hollow_core.lora import dialects
from hollow_core.lora import file as lora_file
from hollow_core.lora.delta import LoraLayer
from hollow_core.lora.dialects import DIALECTS, Lora, kohya_name, weight_shapes
from hollow_core.lora.file import read, write_dialect
from hollow_core.lora.keys import split
from hollow_core.lora.metadata import layout_of
from hollow_core.lora.peft_config import Adapter
from hollow_core.models.layouts import layout_config
from hollow_core.nets.unet_layers import to_ldm

Config = Mapping[str, Any]
TINY: dict[str, Config] = {layout: dict(make_tiny_unet(layout).config) for layout in ("sd15", "sd21", "sdxl")}


def random_layer(shape: tuple[int, ...], rank: int, alpha: float, generator: torch.Generator) -> LoraLayer:
    out, *into = shape
    down = torch.randn(rank, *into, generator=generator) * 0.1
    return LoraLayer(down, torch.randn(out, rank, *[1] * (len(into) - 1), generator=generator) * 0.1, alpha)


def random_lora(config: Config, every: int = 7, seed: int = 0) -> Lora:
    """One on every n-th layer, of several ranks and alphas."""
    generator = torch.Generator().manual_seed(seed)
    shapes = list(weight_shapes(config).items())[::every]
    layers = {
        module: random_layer(shape, 1 + number % 3, float(1 + number % 5), generator)
        for number, (module, shape) in enumerate(shapes)
    }
    return Lora("kohya", layers, {}, ())


def delta(layer: LoraLayer) -> Tensor:
    return layer.alpha / len(layer.down) * layer.up.flatten(1) @ layer.down.flatten(1)


def assert_same_change(found: Mapping[str, LoraLayer], expected: Mapping[str, LoraLayer], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for module, layer in expected.items():
        change = delta(layer)
        assert float((delta(found[module]) - change).norm()) <= tolerance * float(change.norm()), module
        if layer.dora_scale is not None:
            assert torch.allclose(found[module].dora_scale, layer.dora_scale, rtol=tolerance), module


def target(folder: Path, dialect: str) -> Path:
    return folder / dialect if dialect == "peft" else folder / f"{dialect}.safetensors"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_round_trips(tmp_path: Path, data: st.DataObject) -> None:
    """Any ranks, alphas, number format and set of layers, LoRA or DoRA, through all dialects in any order."""
    config = TINY[data.draw(st.sampled_from(list(TINY)), "layout")]
    shapes = weight_shapes(config)
    modules = data.draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, max_size=12, unique=True), "layers")
    ranks = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), "ranks")
    alphas = data.draw(st.lists(st.floats(1e-3, 1e6) | st.floats(-100, -0.01), min_size=1, max_size=3), "alphas")
    dora = data.draw(st.booleans(), "DoRA")
    dtype, tolerance = data.draw(
        st.sampled_from([(torch.float16, 5e-3), (torch.bfloat16, 4e-2), (torch.float32, 1e-5)]), "dtype"
    )
    generator, layers = torch.Generator().manual_seed(0), {}
    for number, module in enumerate(modules):
        rank, alpha = ranks[number % len(ranks)], alphas[number % len(alphas)]
        layer = random_layer(shapes[module], rank, alpha, generator)
        # as sizes are in files: up is small where alpha is large
        layer = layer._replace(up=layer.up * min(1.0, 100 / abs(alpha)))
        layers[module] = layer._replace(dora_scale=torch.rand(len(layer.up), generator=generator) + 1 if dora else None)
    order = data.draw(st.permutations(DIALECTS), "order")
    lora, source = Lora("kohya", layers, {}, ()), target(tmp_path, order[-1])
    write_dialect(source, lora, config, {}, dialect=order[-1], dtype=torch.float32)
    for dialect in order:
        source = lora_file.convert(source, target(tmp_path, dialect), dialect, config=config, dtype=dtype).path
    found, _ = read(source, config)
    assert found.dialect == order[-1]
    assert_same_change(found.layers, layers, tolerance)


def test_what_is_left_as_it_is_stays_exact(tmp_path: Path) -> None:
    """One alpha for all, and no other dialect in between: bit for bit."""
    lora = random_lora(TINY["sdxl"])
    halves = {m: LoraLayer(layer.down.half().float(), layer.up.half().float(), 2.0) for m, layer in lora.layers.items()}
    first = write_dialect(tmp_path / "a.safetensors", lora._replace(layers=halves), TINY["sdxl"], {})
    second = lora_file.convert(first.path, tmp_path / "b.safetensors", "comfy", config=TINY["sdxl"])
    found, _ = read(second.path, TINY["sdxl"])
    assert all(torch.equal(found.layers[module].up, layer.up) for module, layer in halves.items())


# --- what other tools ask for, written down from their rules ---


def original_modules(layout: str) -> set[str]:
    """The layers of the original U-Net, as its plan builds them.

    Stability-AI's ldm/modules/diffusionmodules/openaimodel.py, with v1-inference.yaml, v2-inference.yaml and
    sd_xl_base.yaml: channel_mult, num_res_blocks 2, and the transformers' depth at each level.
    """
    depths = [0, 2, 10] if layout == "sdxl" else [1, 1, 1, 0]
    deepest = depths[-1] or 1
    names = {"input_blocks.0.0", "time_embed.0", "time_embed.2", "out.2"}
    names |= {"label_emb.0.0", "label_emb.0.2"} if layout == "sdxl" else set()

    def resnet(path: str, *, shortcut: bool) -> Iterator[str]:
        yield from (f"{path}.{name}" for name in ("in_layers.2", "emb_layers.1", "out_layers.3"))
        if shortcut:
            yield f"{path}.skip_connection"

    def transformer(path: str, depth: int) -> Iterator[str]:
        yield from (f"{path}.proj_in", f"{path}.proj_out")
        for number in range(depth):
            block = f"{path}.transformer_blocks.{number}"
            yield from (f"{block}.attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0"))
            yield from (f"{block}.ff.net.0.proj", f"{block}.ff.net.2")

    index = 0
    for level, depth in enumerate(depths):
        for number in range(2):
            index += 1
            widens = number == 0 and level in (1, 2)
            names.update(resnet(f"input_blocks.{index}.0", shortcut=widens))
            names.update(transformer(f"input_blocks.{index}.1", depth) if depth else ())
        if level < len(depths) - 1:
            index += 1
            names.add(f"input_blocks.{index}.0.op")
    names.update(resnet("middle_block.0", shortcut=False))
    names.update(transformer("middle_block.1", deepest))
    names.update(resnet("middle_block.2", shortcut=False))
    index = 0
    for level, depth in reversed(list(enumerate(depths))):
        for number in range(3):
            names.update(resnet(f"output_blocks.{index}.0", shortcut=True))
            names.update(transformer(f"output_blocks.{index}.1", depth) if depth else ())
            if number == 2 and level > 0:
                names.add(f"output_blocks.{index}.{2 if depth else 1}.conv")
            index += 1
    return names


_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def a1111(name: str) -> str:
    """The original's name, with underscores, that A1111 looks for: extensions-builtin/Lora/networks.py,
    convert_diffusers_name_to_compvis. Names it does not convert it takes as the original's."""
    name = name.removeprefix("lora_unet_")
    if match := re.fullmatch(r"time_embedding_linear_(\d)", name):
        return f"time_embed_{int(match[1]) * 2 - 2}"
    if match := re.fullmatch(r"down_blocks_(\d)_downsamplers_0_conv", name):
        return f"input_blocks_{3 + 3 * int(match[1])}_0_op"
    if match := re.fullmatch(r"up_blocks_(\d)_upsamplers_0_conv", name):
        return f"output_blocks_{2 + 3 * int(match[1])}_{2 if int(match[1]) else 1}_conv"
    if match := re.fullmatch(r"(down_blocks_|up_blocks_|mid_block)(\d?)_(attentions|resnets)_(\d)_(.+)", name):
        block, level, attends, i = match[1], int(match[2] or 0), int(match[3] == "attentions"), int(match[4])
        place = {
            "down_blocks_": f"input_blocks_{1 + 3 * level + i}_{attends}",
            "mid_block": f"middle_block_{1 if attends else 2 * i}",
            "up_blocks_": f"output_blocks_{3 * level + i}_{attends}",
        }[block]
        return f"{place}_{_RESNET.get(match[5], match[5])}"
    return {"conv_in": "input_blocks_0_0", "conv_out": "out_2"}.get(name, name)


def invokeai(name: str) -> str:
    """The module of diffusers' SDXL U-Net, with underscores, that InvokeAI makes of a name in a kohya file:
    backend/patches/lora_conversions/sdxl_lora_conversion_utils.py, the longest known beginning is replaced."""
    table = {"input_blocks_0_0": "conv_in", "out_2": "conv_out", "middle_block_1": "mid_block_attentions_0"}
    for i in range(2):
        table[f"time_embed_{2 * i}"] = f"time_embedding_linear_{i + 1}"
        table[f"label_emb_0_{2 * i}"] = f"add_embedding_linear_{i + 1}"
    for i in range(3):
        for j in range(2):
            table[f"input_blocks_{3 * i + j + 1}_0"] = f"down_blocks_{i}_resnets_{j}"
            table[f"input_blocks_{3 * i + j + 1}_1"] = f"down_blocks_{i}_attentions_{j}"
            table[f"middle_block_{2 * j}"] = f"mid_block_resnets_{j}"
        for j in range(3):
            table[f"output_blocks_{3 * i + j}_0"] = f"up_blocks_{i}_resnets_{j}"
            table[f"output_blocks_{3 * i + j}_1"] = f"up_blocks_{i}_attentions_{j}"
        table[f"input_blocks_{3 * i + 3}_0_op"] = f"down_blocks_{i}_downsamplers_0_conv"
        table[f"output_blocks_{3 * i + 2}_2"] = f"up_blocks_{i}_upsamplers_0"
    name = name.removeprefix("lora_unet_")
    begin = max((key for key in table if name.startswith(key)), key=len)
    rest = name.removeprefix(begin)
    inner = {theirs: ours for ours, theirs in _RESNET.items()} if "resnets" in table[begin] else {}
    return f"{table[begin]}_{inner.get(rest[1:], rest[1:])}" if rest else table[begin]


def whole_lora(layout: str) -> Lora:
    """LoRA of rank 1 on every layer of the public model, with next to no memory behind it."""
    layers = {}
    for module, (out, *into) in weight_shapes(layout_config(layout)).items():
        ones = [1] * (len(into) - 1)
        layers[module] = LoraLayer(torch.zeros(1).expand(1, *into), torch.zeros(1).expand(out, 1, *ones), 1.0)
    return Lora("kohya", layers, {}, ())


def spelled(layout: str, dialect: str) -> dict[str, Tensor]:
    lora, config = whole_lora(layout), layout_config(layout)
    return dialects.spell(lora.layers, {}, config, dialect, ldm=layout == "sdxl")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_family_is_told_by_the_shapes(layout: str, dialect: str) -> None:
    tensors = spelled(layout, dialect)
    assert layout_of({}, {key: tuple(tensor.shape) for key, tensor in tensors.items()}) == layout
    found = dialects.parse(tensors, layout_config(layout))
    assert found.dialect == dialect
    assert found.layers.keys() == whole_lora(layout).layers.keys()
    assert found.left_out == ()


def test_a1111_finds_every_layer(layout: str) -> None:
    """Forge and ComfyUI ask for the same names: comfy/lora.py, model_lora_keys_unet."""
    tensors = spelled(layout, "kohya")
    parts = {"lora_down.weight", "lora_up.weight", "alpha"}
    names = {key.split(".", 1)[0] for key in tensors}
    assert tensors.keys() == {f"{name}.{part}" for name in names for part in parts}
    assert {a1111(name) for name in names} == {name.replace(".", "_") for name in original_modules(layout)}
    assert (kohya_name("conv_in") in names) == (layout != "sdxl")  # whose trainers use the original's names


def test_invokeai_finds_every_layer() -> None:
    """SDXL's by its own table; it looks for those of SD 1.x and 2.x by diffusers' names."""
    for layout in ("sd15", "sd21", "sdxl"):
        names = {key.split(".", 1)[0] for key in spelled(layout, "kohya")}
        found = {invokeai(name) if layout == "sdxl" else name.removeprefix("lora_unet_") for name in names}
        assert found == {module.replace(".", "_") for module in weight_shapes(layout_config(layout))}


def test_comfyui_finds_every_layer_of_its_own_dialect(layout: str) -> None:
    """comfy/lora.py: "diffusion_model." and the layer's name in the checkpoint, then as in kohya's dialect."""
    names = {re.sub(r"\.(lora_down\.weight|lora_up\.weight|alpha)$", "", key) for key in spelled(layout, "comfy")}
    assert names == {f"diffusion_model.{name}" for name in original_modules(layout)}


# --- other tools themselves ---


def draw(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 2, "generator": generator, "output_type": "np", "height": 64, "width": 64}
    return torch.tensor(pipeline("a photo of a dog", **arguments).images)


def text_lora(pipeline: Any) -> dict[str, LoraLayer]:
    """On every linear layer of the text encoders."""
    generator, layers = torch.Generator().manual_seed(1), {}
    for encoder in ("text_encoder", "text_encoder_2"):
        for name, module in getattr(pipeline, encoder, torch.nn.Identity()).named_modules():
            if isinstance(module, torch.nn.Linear) and ".layers." in name:
                ours = f"{encoder}.text_model.{name.removeprefix('text_model.')}"
                layers[ours] = random_layer(tuple(module.weight.shape), 2, 1.0, generator)
    return layers


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_diffusers_draws_the_same_with_its_dialect_and_kohyas(tmp_path: Path, layout: str) -> None:
    """Layers of several ranks and alphas, convolutions, and the text encoders: nothing is left over in either."""
    pipeline = tiny_pipeline(layout)
    config = dict(pipeline.unet.config)
    lora = random_lora(config)._replace(text=text_lora(pipeline))
    plain, drawn = draw(pipeline), {}
    for dialect in ("kohya", "diffusers"):
        written = write_dialect(target(tmp_path, dialect), lora, config, {}, dialect=dialect)
        assert (written.layers, written.text_layers) == (len(lora.layers), len(lora.text))
        pipeline.load_lora_weights(written.path)  # raises where a key is left over
        loaded = {name.split(".lora_A")[0] for name, _ in pipeline.unet.named_parameters() if ".lora_A" in name}
        assert loaded == lora.layers.keys()
        drawn[dialect] = draw(pipeline)
        pipeline.unload_lora_weights()
    assert float((drawn["kohya"] - plain).abs().max()) > 0.05
    assert float((drawn["kohya"] - drawn["diffusers"]).abs().max()) < 1e-3


def with_magnitudes(lora: Lora, unet: Any) -> Lora:
    norms = {module: unet.get_submodule(module).weight.flatten(1).norm(dim=1) for module in lora.layers}
    return lora._replace(
        layers={m: layer._replace(dora_scale=norms[m].detach() * 1.1) for m, layer in lora.layers.items()}
    )


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_diffusers_and_peft_make_the_same_weights(tmp_path: Path, dora: bool) -> None:
    """W + ΔW, and for DoRA m (W + ΔW) / ‖W + ΔW‖, in diffusers from its dialect, in peft from its folder."""
    unet = make_tiny_unet("sd21")
    lora = random_lora(unet.config)
    lora = with_magnitudes(lora, unet) if dora else lora
    expected = {}
    for module, layer in lora.layers.items():
        weight = unet.get_submodule(module).weight.detach()
        changed = weight + delta(layer).reshape(weight.shape)
        if layer.dora_scale is not None:
            changed *= (layer.dora_scale / changed.flatten(1).norm(dim=1)).reshape(-1, *[1] * (weight.dim() - 1))
        expected[module] = changed
    for dialect in ("diffusers", "peft"):
        path = write_dialect(target(tmp_path, dialect), lora, unet.config, {}, dialect=dialect).path
        other = make_tiny_unet("sd21")
        if dialect == "peft":
            other = PeftModel.from_pretrained(other, str(path)).merge_and_unload()
        else:
            other.load_lora_adapter(path.parent, weight_name=path.name, prefix="unet")
            other.fuse_lora()
            other.unload_lora()
        for module, weight in expected.items():
            assert torch.allclose(other.get_submodule(module).weight, weight, atol=2e-3), (dialect, module)


# --- files of others ---

PLACE = "mid_block.attentions.0.transformer_blocks.0.attn1"
OLD = "mid_block.attentions.0.transformer_blocks.0.attn1.processor"


@pytest.mark.parametrize(
    ("dialect", "down", "up"),
    [
        ("kohya", "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0.lora_down.weight", "lora_up.weight"),
        ("kohya", f"lycoris_{PLACE.replace('.', '_')}_to_out_0.lora_down.weight", "lora_up.weight"),
        ("diffusers", f"unet.{PLACE}.to_out.0.lora.down.weight", "lora.up.weight"),
        ("diffusers", f"{PLACE}.to_out.0.lora_A.weight", "lora_B.weight"),
        ("diffusers", f"unet.{PLACE}.to_out.0.lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        ("diffusers", f"unet.{OLD}.to_out_lora.down.weight", "to_out_lora.up.weight"),
        ("peft", f"base_model.model.{PLACE}.to_out.0.lora_A.default.weight", "lora_B.default.weight"),
        ("comfy", "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_out.0.lora_A.weight", "lora_B.weight"),
    ],
)
def test_other_spellings_are_read(dialect: str, down: str, up: str) -> None:
    tensors = {
        down: torch.randn(3, 24),
        re.sub(r"(to_out_lora|lora_A|lora_down|lora\.down|lora_linear_layer).*", up, down): torch.randn(24, 3),
    }
    found = dialects.parse(tensors, TINY["sd15"])
    assert found.dialect == dialect
    layer = found.layers[f"{PLACE}.to_out.0"]
    assert torch.equal(layer.down, tensors[down])
    assert layer.alpha == 3


def test_alpha_of_diffusers_and_peft_is_in_their_configs(tmp_path: Path) -> None:
    """LoraConfig: lora_alpha, a pattern for some layers, and rank-stabilised scaling, alpha / √rank."""
    names = [f"{PLACE}.to_q", f"{PLACE}.to_k"]
    told = {"r": 4, "lora_alpha": 2, "alpha_pattern": {"attn1.to_k": 6}}
    for config, expected in ((told, [0.5, 1.5]), (told | {"use_rslora": True}, [1.0, 3.0])):
        tensors = {f"{name}.lora_A.weight": torch.ones(4, 24) for name in names}
        tensors |= {f"{name}.lora_B.weight": torch.ones(24, 4) for name in names}
        adapter = json.dumps({f"unet.{key}": value for key, value in config.items()})
        of_diffusers = {f"unet.{key}": tensor for key, tensor in tensors.items()}
        save_file(of_diffusers, tmp_path / "d.safetensors", {"lora_adapter_metadata": adapter})
        of_peft = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
        save_file(of_peft, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        for path in (tmp_path / "d.safetensors", tmp_path):
            found, _ = read(path, TINY["sd15"])
            assert [found.layers[name].scale for name in names] == pytest.approx(expected)


@pytest.mark.parametrize("pattern", [r"(\w|.)*\d{3}", "(", f"({'a' * 2000})"])
def test_a_pattern_for_alpha_cannot_take_for_ever(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first could part the name in more ways than can be tried."""
    monkeypatch.setattr("hollow_core.lora.peft_config.PATIENCE", 0.2)
    path, name = tmp_path / "a.safetensors", f"unet.{PLACE}.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 24), f"{name}.lora_B.weight": torch.ones(24, 2)}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {pattern: 3}})})
    with pytest.raises(HollowError, match=r"In the config of peft's in or beside \S+a.safetensors the alpha_pattern"):
        read(path, TINY["sd15"])


def test_of_patterns_for_alpha_the_first_that_matches_holds() -> None:
    """Names, ends of names and regular expressions, as peft takes them."""
    patterns = {"attn2.to_k": 1, r".*attn1\.to_(k|v)": 2, "to_k": 3, "unet.to_k": 4, "to_v": 5, "(q|to_q)": 6}
    adapter = Adapter({"lora_alpha": 7, "alpha_pattern": patterns})
    names = (
        "a.attn2.to_k",
        "a.attn1.to_k",
        "to_k",
        "a.attn1.to_v",
        "a.attn2.to_v",
        "a.to_q",
        "a.xto_q",
        "b.x_attn2.to_q",
    )
    for name in names:
        expected = patterns.get(get_pattern_key(list(patterns), name), 7)
        assert adapter.alpha(name, 4) == expected, name


def test_three_convolutions_are_folded_into_two() -> None:
    """LyCORIS' LoCon in Tucker form: 1×1 down, 3×3 between, 1×1 up."""
    generator, module = torch.Generator().manual_seed(0), "mid_block.resnets.0.conv1"
    down, mid, up = (torch.randn(*shape, generator=generator) for shape in ((2, 24, 1, 1), (2, 2, 3, 3), (24, 2, 1, 1)))
    name = kohya_name(module)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up}
    layer = dialects.parse(tensors, TINY["sd15"]).layers[module]
    picture = torch.randn(1, 24, 6, 6, generator=generator)
    conv = torch.nn.functional.conv2d
    expected = conv(conv(conv(picture, down), mid), up)
    assert torch.allclose(conv(conv(picture, layer.down), layer.up), expected, atol=1e-4)


def test_shapes_that_no_layer_has_are_refused() -> None:
    name = kohya_name(f"{PLACE}.to_q")
    whole = {f"{name}.lora_down.weight": torch.ones(2, 24), f"{name}.lora_up.weight": torch.ones(24, 2)}
    for more, sentence in (
        ({f"{name}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "is for a convolution, which this layer is not"),
        (
            {f"{name}.dora_scale": torch.ones(2, 12)},
            r"dora_scale of shape \(2, 12\), neither of 24 outputs nor of 24 in",
        ),
        ({f"{name}.alpha": torch.ones(3)}, r"alpha of shape \(3,\), not 1"),
        ({f"{name}.lora_up.weight": torch.ones(24, 3)}, r"has shape \(24, 3\), but this U-Net needs \(24, 2\)"),
        ({f"unet.{PLACE}.to_q.lora_A.weight": torch.ones(2, 24)}, "attn1.to_q twice"),
    ):
        with pytest.raises(HollowError, match=sentence):
            dialects.parse(whole | more, TINY["sd15"])
    bare = {"conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "conv_in.lora_B.weight": torch.ones(8, 2, 1, 1)}
    assert dialects.parse(bare, TINY["sd15"]).layers.keys() == {"conv_in"}


def test_text_encoders_come_along(tmp_path: Path) -> None:
    """In every dialect but peft's, under the names of SD 1.x, 2.x or SDXL; two-path sampling takes none."""
    pipeline = tiny_pipeline("sdxl")
    lora = random_lora(pipeline.unet.config)._replace(text=text_lora(pipeline))
    source = write_dialect(tmp_path / "a.safetensors", lora, pipeline.unet.config, {}).path
    spelled_as = {
        "kohya": "lora_te2_text_model_",
        "diffusers": "text_encoder_2.text_model.",
        "comfy": "text_encoders.clip_g.transformer.text_model.",
    }
    for dialect, prefix in spelled_as.items():
        written = lora_file.convert(source, target(tmp_path, dialect), dialect, config=pipeline.unet.config)
        assert_same_change(read(written.path, pipeline.unet.config)[0].text, lora.text, 5e-3)
        with safe_open(written.path, "pt") as file:
            assert any(key.startswith(prefix) for key in file.keys())  # noqa: SIM118 - no dict
        assert f"{len(lora.text)} of text encoders" in written.sentence
    with pytest.raises(HollowError, match=r"changes a text encoder, too\. Choose diffusers"):
        lora_file.convert(source, tmp_path / "peft", "peft", config=pipeline.unet.config)
    assert not (tmp_path / "peft").exists()
    with pytest.raises(HollowError, match=r"is no plain LoRA of a U-Net: it holds text_encoder.*\(--unet-only\)"):
        lora_file.load(source, pipeline.unet)
    alone = lora_file.load(source, pipeline.unet, unet_only=True)
    assert {key.rsplit(".lora_", 1)[0] for key in alone.state} == lora.layers.keys()
    written = lora_file.convert(source, tmp_path / "peft", "peft", config=pipeline.unet.config, unet_only=True)
    assert (written.layers, written.text_layers) == (len(lora.layers), 0)


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("hada_w1_a", "is a LoHa, which Hollow does not read. Choose a LoRA"),
        ("lokr_w1", "is a LoKr, which Hollow does not read. Choose a LoRA"),
        ("hada_w1_b.default", "is a LoHa, which Hollow does not read. Choose a LoRA"),
        ("oft_blocks", "is an OFT, which Hollow does not read. Choose a LoRA"),
        ("boft_R", "is a BOFT, which Hollow does not read. Choose a LoRA"),
        ("a1.weight", "is a GLoRA, which Hollow does not read. Choose a LoRA"),
        ("on_input", "is an IA³, which Hollow does not read. Choose a LoRA"),
        ("ia3_l", "is an IA³, which Hollow does not read. Choose a LoRA"),
        ("vera_lambda_b", "is a VeRA, which Hollow does not read. Choose a LoRA"),
        ("diff", r"holds no LoRA of a U-Net, but the full difference of a weight \(lora_unet_mid_block\S+_to_q.diff\)"),
    ],
)
def test_other_methods_are_named_and_refused(part: str, sentence: str, tmp_path: Path) -> None:
    """Also where nothing tells the base model."""
    key = f"{kohya_name(PLACE)}_to_q.{part}"
    with pytest.raises(HollowError, match=sentence):
        dialects.parse({key: torch.zeros(24, 2)}, TINY["sd15"])
    if part != "diff":
        alphas = {"lora_unet_a.alpha": torch.ones(()), "lora_unet_a.lora_down.weight": torch.ones(1, 1)}
        save_file({key: torch.zeros(24, 2), **alphas}, tmp_path / "a.safetensors")
        with pytest.raises(HollowError, match=sentence):
            read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("lora_unet_conv_in.diff", "the full difference of a weight"),
        ("lora_unet_conv_in.diff_b", "the change of a bias"),
        ("lora_unet_conv_norm_out.w_norm", "the change of a norm"),
        ("lora_unet_conv_norm_out.b_norm", "the change of a norm"),
        ("lora_unet_conv_in.scalar", "a trained scalar, by which some tools multiply the change and others do not"),
        ("diffusion_model.out.2.set_weight", "a weight in place of the model's, or its new shape"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_k.lora_down.weight", "part of a text encoder"),
        ("bundle_emb.sks.clip_l", "an embedding"),
        ("emb_params", "an embedding"),
    ],
)
def test_what_is_no_lora_is_named(key: str, what: str, tmp_path: Path) -> None:
    lora, source, target = random_lora(TINY["sd15"], every=60), tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = dialects.spell(lora.layers, {}, TINY["sd15"], "kohya", ldm=False)
    save_file(tensors | {key: torch.zeros(8)}, source)
    of_text = what in ("part of a text encoder", "an embedding")
    with pytest.raises(HollowError) as refused:
        lora_file.convert(source, target, config=TINY["sd15"])
    assert f"holds {key}, {what}, which is no LoRA and would be lost. Choose one without" in str(refused.value)
    assert ("(--unet-only)" in str(refused.value)) == of_text
    assert not target.exists()
    if of_text:
        written = lora_file.convert(source, target, config=TINY["sd15"], unet_only=True)
        assert_same_change(read(written.path, TINY["sd15"])[0].layers, lora.layers, 5e-3)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("unet.unet.{}", "unet.{}"),
        ("unet.unet.unet.{}", "unet.{}"),
        ("unet.base_model.model.{}", "unet.{}"),
        ("base_model.model.unet.{}", "base_model.model.{}"),
        ("module.unet._orig_mod.{}", "unet.{}"),
        ("unet.mid_block._orig_mod.attentions.0.transformer_blocks.0._orig_mod.attn1.to_q", "unet.{}"),
        ("unet.diffusion_model.{ldm}", "diffusion_model.{ldm}"),
        ("model.diffusion_model.{ldm}", "diffusion_model.{ldm}"),
        ("diffusion_model.diffusion_model.{ldm}", "diffusion_model.{ldm}"),
    ],
)
def test_prefixes_that_stand_there_by_mistake_are_passed_over(written: str, meant: str) -> None:
    names = {"ldm": "middle_block.1.transformer_blocks.0.attn1.to_q"}
    matrices = {".lora_A.weight": torch.randn(2, 24), ".lora_B.weight": torch.randn(24, 2)}
    found, expected = (
        dialects.parse(
            {name.format(f"{PLACE}.to_q", **names) + part: matrix for part, matrix in matrices.items()}, TINY["sd15"]
        )
        for name in (written, meant)
    )
    assert found.dialect == expected.dialect
    assert torch.equal(found.layers[f"{PLACE}.to_q"].down, expected.layers[f"{PLACE}.to_q"].down)
    nested = "text_encoder.text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"
    assert split(nested) == (nested[13:-14], "down")


def by_input(lora: Lora) -> Lora:
    """With a magnitude for each input of a layer, as LyCORIS has them unless told otherwise."""
    generator = torch.Generator().manual_seed(5)
    layers = {
        module: layer._replace(dora_scale=torch.rand(1, layer.down.shape[1], generator=generator) + 1)
        for module, layer in lora.layers.items()
    }
    return lora._replace(layers=layers)


def test_magnitudes_of_inputs_stay_what_they_are(tmp_path: Path) -> None:
    """In the dialects that can hold them, of convolutions, too; the others are refused, and nothing is written."""
    config, source = TINY["sdxl"], tmp_path / "a.safetensors"
    lora = by_input(random_lora(config))
    tensors = dialects.spell(random_lora(config).layers, {}, config, "kohya", ldm=True)
    for module, layer in lora.layers.items():
        shape = (1, -1, *[1] * (layer.down.dim() - 2))
        tensors[f"{kohya_name(to_ldm(config, module))}.dora_scale"] = layer.dora_scale.reshape(shape)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, source)
    for dialect in ("comfy", "kohya"):
        written = lora_file.convert(source, target(tmp_path, dialect), dialect, config=config, dtype=torch.float32).path
        found, metadata = read(written, config)
        assert found.layers.keys() == lora.layers.keys()
        assert all(torch.equal(found.layers[m].dora_scale, layer.dora_scale) for m, layer in lora.layers.items())
        assert json.loads(metadata["ss_network_args"])["wd_on_output"] == "False"
    with safe_open(written, "pt") as file:
        assert {key: file.get_slice(key).get_shape() for key in file.keys()} == {  # noqa: SIM118 - no dict
            key: list(tensor.shape) for key, tensor in tensors.items()
        }
    for dialect in ("diffusers", "peft"):
        with pytest.raises(
            HollowError, match=rf"a magnitude for each input of \S+, and files in the dialect {dialect}"
        ):
            lora_file.convert(source, tmp_path / "other" / dialect, dialect, config=config)
    assert not (tmp_path / "other").exists()


def test_what_a_conversion_would_lose_is_refused(tmp_path: Path) -> None:
    """ComfyUI's own trainer writes norms and biases, which no other tool reads."""
    lora = random_lora(TINY["sd15"])
    tensors = dialects.spell(lora.layers, {}, TINY["sd15"], "comfy", ldm=True)
    save_file(tensors | {"diffusion_model.out.0.diff": torch.zeros(8)}, tmp_path / "a.safetensors")
    assert read(tmp_path / "a.safetensors", TINY["sd15"])[0].left_out == ("diffusion_model.out.0.diff",)
    with pytest.raises(HollowError, match=r"holds diffusion_model\.out\.0\.diff, .*, which is no LoRA and would"):
        lora_file.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", config=TINY["sd15"])


# --- what is written besides ---


def test_zero_padding_fills_the_blocks_that_have_none(tmp_path: Path, layout: str) -> None:
    config, kinds = TINY[layout], ("attn1.to_q", "attn2.to_v", "resnets.0.conv1")
    of_these = {module: shape for module, shape in weight_shapes(config).items() if module.endswith(kinds)}
    generator = torch.Generator().manual_seed(0)
    layers = {m: random_layer(s, 2, 1.0, generator) for m, s in of_these.items() if m.startswith("up_blocks.1.")}
    written = write_dialect(tmp_path / "a.safetensors", Lora("kohya", layers, {}, ()), config, {}, zero_pad=True)
    found, _ = read(written.path, config)
    assert of_these.keys() <= found.layers.keys()
    assert {module for module in found.layers if ".attn" in module} == {m for m in of_these if ".attn" in m}
    assert {len(layer.down) for layer in found.layers.values()} == {2}
    assert all((delta(layer) == 0).all() == (module not in layers) for module, layer in found.layers.items())
    ones = {module: layer._replace(dora_scale=torch.ones(len(layer.up))) for module, layer in layers.items()}
    dora = Lora("kohya", ones, {}, ())
    with pytest.raises(HollowError, match="A DoRA cannot be padded with zeros"):
        write_dialect(tmp_path / "b.safetensors", dora, config, {}, zero_pad=True)


def test_it_is_said_what_a_file_changes_and_that_it_changes_nothing(tmp_path: Path) -> None:
    lora = random_lora(TINY["sd15"])
    written = write_dialect(tmp_path / "a.safetensors", lora, TINY["sd15"], {}, dtype=torch.float32)
    assert written.largest == pytest.approx(max(float(delta(layer).abs().max()) for layer in lora.layers.values()))
    assert f"{len(lora.layers)} layers of the U-Net, every key matched; the largest |ΔW| is" in written.sentence
    still = lora._replace(layers={m: layer._replace(up=layer.up * 0) for m, layer in lora.layers.items()})
    written = write_dialect(tmp_path / "a.safetensors", still, TINY["sd15"], {})
    assert written.sentence.endswith("every key matched; all of them zero, so it has NO effect.")


def test_a_tiny_alpha_is_not_lost(tmp_path: Path) -> None:
    """In fp16 it would be zero, which stands for the rank."""
    lora = random_lora(TINY["sd15"])
    tiny = lora._replace(layers={m: layer._replace(alpha=1e-8) for m, layer in lora.layers.items()})
    assert 0 < write_dialect(tmp_path / "a.safetensors", tiny, TINY["sd15"], {}).largest < 1e-8


def test_a_number_too_large_is_refused_where_it_does_not_fit(tmp_path: Path) -> None:
    lora = random_lora(TINY["sd15"])
    large = lora._replace(layers={m: layer._replace(up=layer.up * 1e7) for m, layer in lora.layers.items()})
    with pytest.raises(HollowError, match=r"infinite or undefined values in \S+\. Lower .* or write fp32"):
        write_dialect(tmp_path / "a.safetensors", large, TINY["sd15"], {})
    assert not list(tmp_path.iterdir())
    write_dialect(tmp_path / "a.safetensors", large, TINY["sd15"], {}, dtype=torch.float32)
    with pytest.raises(HollowError, match=r"A peft LoRA is a folder, not a\.safetensors"):
        write_dialect(tmp_path / "a.safetensors", lora, TINY["sd15"], {}, dialect="peft")
    with pytest.raises(HollowError, match=r"There is no dialect 'a1111'\. Choose one of kohya, diffusers, peft, comfy"):
        write_dialect(tmp_path / "a.safetensors", lora, TINY["sd15"], {}, dialect="a1111")
