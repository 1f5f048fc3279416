"""Models that are not what loading would like: parts that lack something, and files that others wrote in their way."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_base_model import assert_is, refusal
from tiny_pipelines import Pipeline, original_checkpoint, shallow_pipeline, tiny_pipeline, write_holes
from torch import Tensor

from hollow_core.analysis.base_weights import base_weights
from hollow_core.errors import HollowError
from hollow_core.models.base_model import load, outline
from hollow_core.models.layouts import FOLDER
from hollow_core.nets.unet_layers import ldm_names, to_ldm

FP8 = torch.float8_e4m3fn
NAMES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture(scope="module")
def original() -> Pipeline:
    return shallow_pipeline("sd15")


@pytest.fixture(scope="module")
def saved(original: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    original.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A folder that a test may spoil."""
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def tensors(original: Pipeline) -> dict[str, Tensor]:
    """The same as an original checkpoint."""
    return original_checkpoint(original, "sd15")


def weights_of(folder: Path, part: str) -> Path:
    return folder / part / f"{NAMES[part]}.safetensors"


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(file)), file, {"format": "pt"})


def edit(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def outline_refusal(folder: Path) -> str:
    with pytest.raises(HollowError) as refused:
        outline(str(folder))
    return str(refused.value)


@pytest.mark.parametrize("part", NAMES)
def test_every_part_of_a_folder_is_whole(folder: Path, part: str) -> None:
    file = weights_of(folder, part)
    lost = list(load_file(file))[-1]
    rewrite(file, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != lost})
    assert f"{folder / part} lacks weights, such as {lost}. Get the full model" in refusal(folder)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    assert f"{file} is not a whole safetensors file: it is a git-lfs pointer" in refusal(folder)
    file.unlink()
    assert f"{folder / part} does not load: it has no {file.name}" in refusal(folder)
    shutil.rmtree(folder / part)
    assert f"{folder / part} does not load: it lacks its config.json" in refusal(folder)
    assert f"{folder / part} does not load: it lacks its config.json" in outline_refusal(folder)


@pytest.mark.parametrize("part", NAMES)
def test_weights_of_another_shape(folder: Path, part: str) -> None:
    file = weights_of(folder, part)
    first = next(iter(load_file(file)))
    rewrite(file, lambda tensors: tensors | {first: torch.cat([tensors[first]] * 2).contiguous()})
    assert str(folder / part) in refusal(folder)


@pytest.mark.parametrize(("taken", "given"), [("text_model.", ""), ("", "text_model.")])
def test_clip_is_found_by_the_names_of_every_version(folder: Path, original: Pipeline, taken: str, given: str) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {given + name.removeprefix("text_model.").removeprefix(taken): it for name, it in tensors.items()}

    rewrite(weights_of(folder, "text_encoder"), change)
    assert_is(load(folder), original)


@pytest.mark.parametrize("name", ["model.safetensors", "model.fp16.safetensors"])
def test_each_part_is_loaded_from_the_files_that_it_has(folder: Path, original: Pipeline, name: str) -> None:
    """As after a download of "*.fp16.safetensors", of which the VAE had none."""
    weights_of(folder, "text_encoder").rename(folder / "text_encoder" / name)
    unet = weights_of(folder, "unet")
    unet.rename(unet.with_suffix(".fp16.safetensors"))
    assert_is(load(folder), original)


def test_half_precision_in_shards(saved: Path, tmp_path: Path, original: Pipeline) -> None:
    """Beside the index of plain shards, which were not downloaded."""
    folder = tmp_path / "model"
    original.save_pretrained(folder, variant="fp16", max_shard_size="50KB")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    assert index.exists()
    plain = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(plain))
    assert_is(load(folder), original)
    weight = base_weights(folder, original.unet.config)("mid_block.attentions.0.proj_in")
    assert torch.equal(weight, original.unet.mid_block.attentions[0].proj_in.weight)
    lost = sorted((folder / "unet").glob("*.fp16-*.safetensors"))[0]
    lost.unlink()
    index.with_name("diffusion_pytorch_model.safetensors.index.json").unlink()
    assert f"{folder / 'unet'} does not load: it lacks {lost.name}" in refusal(folder)
    index.write_text('{"weight_map": []}')
    assert "does not tell which weight is in which file" in refusal(folder)


BROKEN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "an index that is a list": (
        "model_index.json is no JSON object but a list. Get it again",
        lambda folder: (folder / "model_index.json").write_text("[]"),
    ),
    "an index that names no pipeline": (
        "model_index.json does not name a pipeline",
        lambda folder: edit(folder / "model_index.json", _class_name=["a", "StableDiffusionPipeline"]),
    ),
    "an index without a text encoder": (
        "lacks its text_encoder. Get the whole model",
        lambda folder: edit(folder / "model_index.json", text_encoder=[None, None]),
    ),
    "another text encoder": (
        "is a BertModel. Hollow takes CLIPTextModel",
        lambda folder: edit(folder / "model_index.json", text_encoder=["transformers", "BertModel"]),
    ),
    "another VAE": (
        "is a VQModel. Hollow takes AutoencoderKL or AutoencoderTiny there",
        lambda folder: edit(folder / "vae" / "config.json", _class_name="VQModel"),
    ),
    "a config that is broken": (
        "config.json is not valid JSON",
        lambda folder: (folder / "unet" / "config.json").write_text('{"sample_size": 16'),
    ),
    "a config that is a list": (
        "config.json is no JSON object but a list",
        lambda folder: (folder / "text_encoder" / "config.json").write_text("[1]"),
    ),
    "a config of other types": (
        "unet does not load: ",
        lambda folder: edit(folder / "unet" / "config.json", block_out_channels="many"),
    ),
    "a text encoder's config of other types": (
        "text_encoder does not load: ",
        lambda folder: edit(folder / "text_encoder" / "config.json", hidden_size="wide"),
    ),
    "no native size": (
        "has the sample_size None. Write the side",
        lambda folder: edit(folder / "unet" / "config.json", sample_size=None),
    ),
    "a U-Net by bitsandbytes": (
        "unet is quantised on disk (bitsandbytes), which Hollow does not read. Get the model in plain weights",
        lambda folder: edit(
            folder / "unet" / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
        ),
    ),
    "a text encoder by bitsandbytes": (
        "text_encoder is quantised on disk (bitsandbytes)",
        lambda folder: edit(
            folder / "text_encoder" / "config.json", quantization_config={"quant_method": "bitsandbytes"}
        ),
    ),
    "no tokenizer": ("lacks its tokenizer. Get the whole model", lambda folder: shutil.rmtree(folder / "tokenizer")),
    "a tokenizer without words": (
        "lacks its tokenizer. Get the whole model",
        lambda folder: [file.unlink() for file in (folder / "tokenizer").iterdir() if "config" not in file.name],
    ),
    "a tokenizer that is broken": (
        "tokenizer does not load: ",
        lambda folder: [file.write_text("{") for file in (folder / "tokenizer").iterdir() if file.suffix == ".json"],
    ),
    "an encoder with more tokens than the tokenizer": (
        "tokenizer has 49408 tokens, its text encoder 49409, as where textual inversion",
        lambda folder: (
            edit(folder / "text_encoder" / "config.json", vocab_size=49409),
            rewrite(weights_of(folder, "text_encoder"), one_more_token),
        ),
    ),
    "a tokenizer with more tokens than the encoder": (
        "has 49409 tokens, its text encoder 49408",
        lambda folder: one_more_word(folder),
    ),
}


def one_more_token(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    return tensors | {name: torch.cat([tensors[name], tensors[name][:1]]).contiguous()}


def one_more_word(folder: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens("<rex>")
    tokenizer.save_pretrained(folder / "tokenizer")


@pytest.mark.parametrize("case", BROKEN)
def test_loading_and_planning_say_the_same_of_a_broken_folder(folder: Path, case: str) -> None:
    sentence, spoil = BROKEN[case]
    spoil(folder)
    assert sentence in refusal(folder)
    assert sentence in outline_refusal(folder)


def test_a_pruned_folder(folder: Path) -> None:
    edit(folder / "unet" / "config.json", mid_block_type="UNetMidBlock2D")
    file = weights_of(folder, "unet")
    rewrite(file, lambda tensors: {name: it for name, it in tensors.items() if "mid_block.attentions" not in name})
    for said in (refusal(folder), outline_refusal(folder)):
        assert "Hollow cannot cut a U-Net with a UNetMidBlock2D" in said


def test_textual_inversion_that_changed_weights_only(folder: Path) -> None:
    rewrite(weights_of(folder, "text_encoder"), one_more_token)
    assert "has 49409 tokens, not 49408 as its tokenizer and config: textual inversion" in refusal(folder)


def test_textual_inversion_that_changed_all_is_taken(folder: Path) -> None:
    one_more_word(folder)
    edit(folder / "text_encoder" / "config.json", vocab_size=49409)
    rewrite(weights_of(folder, "text_encoder"), one_more_token)
    model = load(folder)
    assert model.tokenizers[0]("<rex>").input_ids[1] == 49408
    assert model.encode_prompt("a <rex>").encoder_hidden_states.isfinite().all()


def test_transformers_are_looked_at_alike(transformer_folder: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(transformer_folder("z-image"), tmp_path / "model")
    folder = tmp_path / "model"
    edit(folder / "transformer" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    for said in (refusal(folder), outline_refusal(folder)):
        assert "transformer is quantised on disk (bitsandbytes)" in said
    edit(folder / "transformer" / "config.json", quantization_config=None)
    shutil.rmtree(folder / "tokenizer")
    for said in (refusal(folder), outline_refusal(folder)):
        assert "lacks its tokenizer. Get the whole Z-Image" in said


def single_file(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def scaled_fp8(tensors: dict[str, Tensor], end: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The matrices of a checkpoint in fp8 under a scale each, and what they stand for."""
    stored, meant = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if weight.dim() == 2 and name.endswith(".weight") and "embedding" not in name:
            scale = weight.abs().max() / torch.finfo(FP8).max
            stored[name] = (weight / scale).to(FP8)
            stored[name.removesuffix("weight") + end] = scale
            meant[name] = stored[name].float() * scale
    return stored, meant


@pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
def test_a_checkpoint_in_scaled_fp8(
    tmp_path: Path, saved: Path, original: Pipeline, tensors: dict[str, Tensor], end: str
) -> None:
    stored, meant = scaled_fp8(tensors, end)
    path = single_file(tmp_path, stored | {"model.diffusion_model.scaled_fp8": torch.zeros(2, dtype=FP8)})
    model = load(path, config=saved)
    unet = original.unet.config
    for name, weight in model.unet.state_dict().items():
        assert torch.equal(weight, meant[f"model.diffusion_model.{to_ldm(unet, name)}"])
    (text,) = [
        it for name, it in model.text_encoders[0].state_dict().items() if name.endswith("layers.0.mlp.fc1.weight")
    ]
    assert torch.equal(text, meant["cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"])
    layer = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    expected = meant[f"model.diffusion_model.{to_ldm(unet, layer)}.weight"]
    assert torch.equal(base_weights(path, unet)(layer), expected)


def test_a_folder_in_scaled_fp8(folder: Path, original: Pipeline) -> None:
    stored, meant = scaled_fp8(original.unet.state_dict(), "weight_scale")
    save_file(stored, weights_of(folder, "unet"), {"format": "pt"})
    unet = load(folder).unet.state_dict()
    assert all(torch.equal(unet[name], meant[name]) for name in unet)
    layer = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert torch.equal(base_weights(folder, original.unet.config)(layer), meant[f"{layer}.weight"])


def test_a_merge_that_names_clip_as_novelai_did(
    tmp_path: Path, saved: Path, original: Pipeline, tensors: dict[str, Tensor]
) -> None:
    merged = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in tensors.items()}
    assert_is(load(single_file(tmp_path, merged), config=saved), original)


def test_textual_inversion_in_a_file(tmp_path: Path, saved: Path, tensors: dict[str, Tensor]) -> None:
    path = single_file(tmp_path, one_more_token(tensors))
    assert "The text_encoder of " in refusal(path, config=saved)
    assert "has 49409 tokens, not 49408" in refusal(path, config=saved)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda names: [name for name in names if "middle_block.1." not in name], "it lacks middle_block.1"),
        (lambda names: [*names, "model.diffusion_model.time_embed.cond_proj.weight"], "it has time_embed.cond_proj"),
        (lambda names: [*names, "model.diffusion_model.middle_block.3.in_layers.0.weight"], "it has middle_block.3"),
    ],
)
def test_a_u_net_of_other_layers(
    tmp_path: Path, saved: Path, tensors: dict[str, Tensor], change: Callable[[Any], list[str]], sentence: str
) -> None:
    changed = {name: tensors.get(name, torch.zeros(2)) for name in change(tensors)}
    said = refusal(single_file(tmp_path, changed), config=saved)
    assert f"with other layers: {sentence}" in said
    assert "or a model fine-tuned from it." in said


@pytest.mark.slow
@pytest.mark.parametrize(("name", "depth"), [("SSD-1B", 4), ("Segmind-Vega", 2)])
def test_pruned_models_are_named_by_loading_and_planning(tmp_path: Path, name: str, depth: int) -> None:
    """A file with SDXL's names and sizes but for what those lack, and holes for numbers."""
    model = outline("sdxl", torch.float16)
    unet = model.unet.state_dict()
    parts = {f"model.diffusion_model.{ldm}": unet[key] for key, ldm in ldm_names(model.unet.config, unet).items()}
    others = {"first_stage_model.a": torch.zeros(1), "conditioner.b": torch.zeros(1)}

    def is_left(key: str) -> bool:
        deep = key.split("transformer_blocks.")[1:]
        return not (re.search(r"middle_block\.[12]\.", key) or (deep and int(deep[0].split(".")[0]) >= depth))

    left = {key: tensor for key, tensor in parts.items() if is_left(key)}
    write_holes(tmp_path / "model.safetensors", left | others)
    for said in (outline_refusal(tmp_path / "model.safetensors"), refusal(tmp_path / "model.safetensors")):
        assert f"is {name}, whose U-Net is that of SDXL with other layers: it lacks " in said


def test_a_file_lacks_the_same_in_planning_and_in_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_pipeline("sdxl")
    monkeypatch.setattr("hollow_core.models.layouts.FOLDER", tmp_path)
    pipeline.save_pretrained(tmp_path / "sdxl")
    shutil.copytree(FOLDER / "tokenizer", tmp_path / "tokenizer")
    monkeypatch.setattr("hollow_core.models.single_file._WIDTHS", {20: "sdxl"})
    whole = original_checkpoint(pipeline, "sdxl")
    path = single_file(tmp_path, whole)
    told, found = outline(str(path)), load(path)
    for mine, theirs in zip((told.vae, *told.text_encoders), (found.vae, *found.text_encoders), strict=True):
        assert {n: t.shape for n, t in mine.state_dict().items()} == {
            n: t.shape for n, t in theirs.state_dict().items()
        }
    for lost in (
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "first_stage_model.decoder.conv_in.bias",
        "model.diffusion_model.out.0.bias",
    ):
        single_file(tmp_path, {name: tensor for name, tensor in whole.items() if name != lost})
        assert refusal(path) == outline_refusal(path)
        assert "lacks weights of its " in refusal(path)
