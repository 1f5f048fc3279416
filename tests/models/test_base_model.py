"""Loading base models: folders and single files, tiny ones whole and the public ones by their sizes."""

import gc
import json
import pickle
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import save_file
from tiny_pipelines import Pipeline, original_checkpoint, shallow_pipeline, tiny_pipeline, tiny_vae
from tiny_unets import make_shallow_unet, make_tiny_unet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from hollow_core.data.images import TrainingImage
from hollow_core.errors import HollowError
from hollow_core.models.base_model import (
    BaseModel,
    decode_images,
    encode_images,
    encode_prompt,
    free_encoders,
    load,
    outline,
    outlines,
    tile_vae,
)
from hollow_core.models.layouts import FOLDER
from hollow_core.nets.residency import away, stream


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may reach the network: any connection is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was looked for in the network")

    monkeypatch.setattr("socket.socket.connect", refuse)


def save_folder(pipeline: Pipeline, folder: Path, **options: Any) -> Path:
    pipeline.save_pretrained(folder, **options)
    return folder


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def assert_is(model: BaseModel, pipeline: Pipeline) -> None:
    assert same_weights(model.unet, pipeline.unet)
    assert same_weights(model.vae, pipeline.vae)
    assert same_weights(model.text_encoders[0], pipeline.text_encoder)
    if "text_encoder_2" in pipeline.components:
        assert same_weights(model.text_encoders[1], pipeline.text_encoder_2)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_diffusers_folder(tmp_path: Path, layout: str, variant: str | None) -> None:
    pipeline = tiny_pipeline(layout)
    model = load(save_folder(pipeline, tmp_path / "my model", variant=variant))
    assert_is(model, pipeline)
    assert model.resolution == 128
    assert not any(part.training for part in (model.unet, model.vae, *model.text_encoders))


@pytest.mark.slow
def test_a_single_file(tmp_path: Path, layout: str) -> None:
    """The checkpoint's names are those of the original code; diffusers' converter must find every tensor."""
    pipeline = tiny_pipeline(layout)
    save_file(original_checkpoint(pipeline, layout), tmp_path / "model.safetensors")
    model = load(tmp_path / "model.safetensors", config=save_folder(pipeline, tmp_path / "configs"))
    assert_is(model, pipeline)


def test_a_file_in_half_precision_stays_so(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd15").to(dtype=torch.float16)
    save_file(original_checkpoint(pipeline, "sd15"), tmp_path / "model.safetensors")
    configs = save_folder(tiny_pipeline("sd15"), tmp_path / "configs")
    model = load(tmp_path / "model.safetensors", torch.float16, config=configs)
    assert {part.dtype for part in (model.unet, model.vae, *model.text_encoders)} == {torch.float16}
    assert_is(model, pipeline)


# Parameters of the published models: U-Net, VAE, text encoders.
PUBLISHED = {
    "sd15": (859_520_964, 83_653_863, 123_060_480),
    "sd21": (865_910_724, 83_653_863, 340_387_840),
    "sdxl": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
}


def test_the_layouts_are_those_of_the_published_models(layout: str) -> None:
    folder = FOLDER / layout
    with torch.device("meta"):
        parts = [
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
            AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
            CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
        ]
        if layout == "sdxl":
            parts.append(CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folder / "text_encoder_2")))
    assert tuple(sum(parameter.numel() for parameter in part.parameters()) for part in parts) == PUBLISHED[layout]
    schedule = DDIMScheduler.from_pretrained(folder / "scheduler")
    assert abs(float(schedule.alphas_cumprod[-1]) - 0.0047) < 1e-4


TEXT_WIDTHS = {"sd15": 768, "sd21": 1024, "sdxl": 2048}
SD2_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


@pytest.mark.slow
def test_a_single_file_by_itself(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word about its kind: known by its text width, with the tokenizers of that kind.

    The layouts are tiny ones here; the file of SD 2.x is one of the 768-pixel model.
    """
    for name, width in TEXT_WIDTHS.items():
        pipeline = tiny_pipeline(name)
        pipeline.unet = make_tiny_unet(name, cross_attention_dim=width)
        save_folder(pipeline, tmp_path / "layouts" / name)
        if name == layout:
            original, tensors = pipeline, original_checkpoint(pipeline, layout)
    if layout == "sd21":
        tensors[SD2_BIAS].copy_(torch.linspace(-0.3, 0.3, len(tensors[SD2_BIAS])))
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copytree(FOLDER / "tokenizer", tmp_path / "layouts" / "tokenizer")
    monkeypatch.setattr("hollow_core.models.layouts.FOLDER", tmp_path / "layouts")

    model = load(tmp_path / "model.safetensors")
    assert_is(model, original)
    assert model.layout == layout
    assert model.resolution == (768 if layout == "sd21" else 128)
    assert model.schedule.prediction.name == ("v_prediction" if layout == "sd21" else "epsilon")
    # What OpenAI's own tokenizer makes of this sentence; OpenCLIP pads with zeros.
    padding = {"sd15": [49407], "sd21": [0], "sdxl": [49407, 0]}[layout]
    for tokenizer, pad in zip(model.tokenizers, padding, strict=True):
        tokens = tokenizer("a photo of a cat", padding="max_length").input_ids
        assert tokens[:8] == [49406, 320, 1125, 539, 320, 2368, 49407, pad]
        assert len(tokens) == 77


@pytest.mark.slow
@pytest.mark.parametrize(("spread", "prediction_type"), [(0.03, "epsilon"), (0.3, "v_prediction")])
def test_sd2_is_told_apart_by_a_bias(tmp_path: Path, spread: float, prediction_type: str) -> None:
    pipeline = tiny_pipeline("sd21")
    pipeline.unet = make_tiny_unet("sd21", cross_attention_dim=1024)
    tensors = original_checkpoint(pipeline, "sd21")
    tensors[SD2_BIAS] = torch.linspace(-spread, spread, len(tensors[SD2_BIAS]))
    save_file(tensors, tmp_path / "model.safetensors")
    configs = save_folder(pipeline, tmp_path / "configs")
    model = load(tmp_path / "model.safetensors", config=configs)
    assert model.schedule.prediction.name == prediction_type
    overridden = load(tmp_path / "model.safetensors", config=configs, prediction_type="sample")
    assert overridden.schedule.prediction.name == "sample"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metadata", "markers", "prediction_type"),
    [
        ({}, [], "epsilon"),
        ({"modelspec.prediction_type": "epsilon"}, [], "epsilon"),
        ({"modelspec.prediction_type": "v"}, [], "v_prediction"),
        ({}, ["v_pred"], "v_prediction"),
        ({}, ["v_pred", "ztsnr"], "v_prediction"),
    ],
)
def test_where_a_single_file_tells_its_schedule(
    tmp_path: Path, metadata: dict[str, str], markers: list[str], prediction_type: str
) -> None:
    pipeline = tiny_pipeline("sdxl")
    tensors = original_checkpoint(pipeline, "sdxl") | {key: torch.empty(0) for key in markers}
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    schedule = load(tmp_path / "model.safetensors", config=save_folder(pipeline, tmp_path / "configs")).schedule
    assert schedule.prediction.name == prediction_type
    assert (float(schedule.numbers[-1]) < 1e-6) == ("ztsnr" in markers)


def test_a_folder_tells_its_schedule(tmp_path: Path) -> None:
    zero_snr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    model = load(save_folder(tiny_pipeline("sd21", **zero_snr), tmp_path))
    assert isinstance(model.scheduler, DDPMScheduler)
    assert model.schedule.prediction.name == "v_prediction"
    assert float(model.schedule.numbers[-1]) < 1e-6
    sampler = model.pipeline().scheduler
    sampler.set_timesteps(10)
    assert int(sampler.timesteps[0]) == 999
    assert sampler.config.prediction_type == "v_prediction"


def test_where_a_single_file_is_silent_its_configs_tell(tmp_path: Path) -> None:
    configs = save_folder(tiny_pipeline("sd15", prediction_type="v_prediction"), tmp_path / "configs")
    path = single_file(tmp_path, original_checkpoint(tiny_pipeline("sd15"), "sd15"))
    assert load(path, config=configs).schedule.prediction.name == "v_prediction"
    assert load(path, config=configs, prediction_type="epsilon").schedule.prediction.name == "epsilon"


@pytest.mark.slow
def test_the_pipeline_draws_what_the_original_draws(tmp_path: Path, layout: str) -> None:
    original = tiny_pipeline(layout)
    pipeline = load(save_folder(original, tmp_path)).pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pictures = [
        pipe("a photo of a dog", num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
        for pipe in (original, pipeline)
    ]
    np.testing.assert_array_equal(*pictures)


def test_prompts_are_encoded_as_the_pipeline_encodes_them(tmp_path: Path, layout: str) -> None:
    original = tiny_pipeline(layout)
    model = load(save_folder(original, tmp_path))
    seen: list[dict[str, Any]] = []
    original.unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    prompt = "a photo of a sks dog"
    original(prompt, num_inference_steps=1, guidance_scale=1.0, width=96, height=160, output_type="latent")
    conditioning = encode_prompt(model, prompt, size=(160, 96))
    torch.testing.assert_close(conditioning.encoder_hidden_states, seen[0]["encoder_hidden_states"])
    assert conditioning.encoder_hidden_states.shape[:2] == (1, 77)
    if layout == "sdxl":
        torch.testing.assert_close(conditioning.text_embeds, seen[0]["added_cond_kwargs"]["text_embeds"])
        torch.testing.assert_close(conditioning.time_ids, seen[0]["added_cond_kwargs"]["time_ids"])
        assert encode_prompt(model, prompt).time_ids.tolist() == [[128, 128, 0, 0, 128, 128]]
    else:
        assert conditioning.text_embeds is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pictures_become_scaled_latents(tmp_path: Path, dtype: torch.dtype) -> None:
    model = load(save_folder(tiny_pipeline("sdxl"), tmp_path), dtype)
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    image = TrainingImage(Image.fromarray(colours), None, "a.png", (0, 0, 64, 64))
    (latents,) = encode_images(model, [image])
    assert latents.dtype == model.vae.dtype == dtype
    with torch.no_grad():
        reference = model.pipeline().image_processor.preprocess(image.picture)
        distribution = model.vae.float().encode(reference).latent_dist
    expected = distribution.mean * model.vae.config.scaling_factor
    torch.testing.assert_close(latents.float(), expected, rtol=2e-3, atol=2e-3)
    assert latents.shape == (1, 4, 8, 8)


STATISTICS = {"latents_mean": [-1.6, 0.9, -1.4, 0.7], "latents_std": [8.5, 5.6, 6.3, 5.1], "scaling_factor": 0.5}
"""As Playground v2.5's."""


def test_a_mean_and_a_deviation_of_each_channel_count_as_in_the_pipeline(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sdxl")
    pipeline.vae.register_to_config(**STATISTICS)
    model = load(save_folder(pipeline, tmp_path))
    theirs = model.pipeline()
    theirs.set_progress_bar_config(disable=True)
    drawn = {
        kind: theirs("a dog", num_inference_steps=1, generator=torch.manual_seed(0), output_type=kind).images
        for kind in ("latent", "np")
    }
    (ours,) = decode_images(model, [drawn["latent"]])
    np.testing.assert_allclose(np.asarray(ours) / 255, drawn["np"][0], atol=0.51 / 255)

    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (found,) = encode_images(model, [TrainingImage(Image.fromarray(colours), None, "", (0, 0, 64, 64))])
    model.vae.register_to_config(latents_mean=None, latents_std=None)
    (plain,) = encode_images(model, [TrainingImage(Image.fromarray(colours), None, "", (0, 0, 64, 64))])
    mean, deviation = (torch.tensor(STATISTICS[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(found * deviation + mean * 0.5, plain, rtol=1e-4, atol=1e-4)


def test_statistics_of_another_vae_are_refused(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sdxl")
    pipeline.vae.register_to_config(latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    model = load(save_folder(pipeline, tmp_path))
    with pytest.raises(HollowError, match=r"are not for its 4 channels\. Get its config again"):
        decode_images(model, [torch.zeros(1, 4, 8, 8)])


def test_a_tiled_vae_sees_a_tile_at_a_time(tmp_path: Path) -> None:
    model = load(save_folder(tiny_pipeline("sd15"), tmp_path))
    side = model.resolution
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)

    def encoded(side: int) -> torch.Tensor:
        return encode_images(
            model, [TrainingImage(Image.fromarray(pixels[:side, :side]), None, "", (0, 0, side, side))]
        )[0]

    whole, tile = encoded(side), encoded(side // 2)
    tile_vae(model)
    tiled = encoded(side)
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    alone = int(0.75 * tile.shape[-1])  # a quarter is blended into the next tile
    assert torch.equal(tiled[..., :alone, :alone], tile[..., :alone, :alone])
    (picture,) = decode_images(model, [tiled])
    assert picture.size == (side, side)


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_streamed_text_encoders_say_the_same(tmp_path: Path, layout: str) -> None:
    model = load(save_folder(tiny_pipeline(layout), tmp_path))
    expected = encode_prompt(model, "a photo of a dog")
    for encoder in model.text_encoders:
        stream(encoder, "cpu")
        assert away(encoder)
    for _ in range(2):  # the second time, each weight comes one ahead
        found = encode_prompt(model, "a photo of a dog")
        assert torch.equal(found.encoder_hidden_states, expected.encoder_hidden_states)


def test_encoders_leave_memory(tmp_path: Path) -> None:
    model = load(save_folder(tiny_pipeline("sd15"), tmp_path))
    gone = [weakref.ref(part) for part in (model.vae, *model.text_encoders)]
    free_encoders(model)
    gc.collect()
    assert [part() for part in gone] == [None, None]
    with pytest.raises(HollowError, match=r"text encoder was set free already\. Encode all prompts before"):
        encode_prompt(model, "a dog")
    with pytest.raises(HollowError, match=r"VAE was set free already\. Encode all pictures before"):
        encode_images(model, [])


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(HollowError) as refused:
        load(path, **options)
    return str(refused.value)


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    assert "sd 1.5.safetensors does not exist. Give a .safetensors" in refusal(tmp_path / "sd 1.5.safetensors")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickle_is_never_read(tmp_path: Path, suffix: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "harm done",))

    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    assert "is no .safetensors file. Pickles (.ckpt, .pt, .bin) are never read" in refusal(path)
    path.rename(tmp_path / "renamed.safetensors")
    assert "renamed.safetensors is not a whole safetensors file" in refusal(tmp_path / "renamed.safetensors")
    assert not (tmp_path / "harm done").exists()


def test_a_folder_of_pickles_is_never_read(tmp_path: Path) -> None:
    save_folder(tiny_pipeline("sd15"), tmp_path, safe_serialization=False)
    assert "does not load: " in refusal(tmp_path)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "is no diffusers folder: it has no model_index.json" in refusal(tmp_path)


def test_a_folder_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    assert "holds a PixArtAlphaPipeline. Hollow takes text-to-image models" in refusal(tmp_path)


def single_file(tmp_path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    save_file(dict(tensors), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without weights: what is refused, is refused before they are read."""
    folder = save_folder(shallow_pipeline("sd15"), tmp_path_factory.mktemp("configs"))
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


def refused_with(configs: Path, folder: Path, file: str, **changes: Any) -> str:
    """What is said of the model with another entry in one of its files, by load and outline alike."""
    shutil.copytree(configs, folder, dirs_exist_ok=True)
    told = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(told))
    said = refusal(folder)
    with pytest.raises(HollowError) as refused:
        outline(str(folder))
    assert str(refused.value) == said
    return said


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "LCMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_folder_with_another_kind_of_scheduler(configs: Path, tmp_path: Path, name: str) -> None:
    said = refused_with(configs, tmp_path, "scheduler/scheduler_config.json", _class_name=name)
    assert f"{tmp_path} has the scheduler {name}, but Hollow trains U-Nets on DDPM's noise alone" in said


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"time_cond_proj_dim": 256}, "has time_cond_proj_dim 256, for the scale of guidance, as LCM is told it"),
        ({"class_embed_type": "timestep"}, "has class_embed_type 'timestep'"),
        ({"num_class_embeds": 1000}, "has num_class_embeds 1000, for classes or noise levels"),
        ({"addition_embed_type": "image"}, "has addition_embed_type 'image', for more than SDXL is told"),
        ({"addition_embed_type": "text"}, "has addition_embed_type 'text'"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "has encoder_hid_dim_type 'ip_image_proj'"),
        ({"encoder_hid_dim": 4096}, "has encoder_hid_dim 4096, for prompts of another encoder"),
        ({"attention_type": "gated"}, "has attention_type 'gated', for boxes, as GLIGEN"),
        ({"dual_cross_attention": True}, "has dual_cross_attention True"),
        ({"cross_attention_dim": [12, 12]}, "has cross_attention_dim [12, 12], but prompts have one width"),
        ({"in_channels": 9}, "takes 9 channels and gives 4. Use a model that is not for inpainting"),
        ({"in_channels": 8}, "takes 8 channels and gives 4"),
        ({"out_channels": 8}, "takes 4 channels and gives 8"),
        ({"mid_block_type": None}, "Hollow cannot cut a U-Net with no middle"),
        ({"down_block_types": ["CrossAttnDownBlockMotion", "DownBlock2D"]}, "with a CrossAttnDownBlockMotion"),
        ({"up_block_types": ["SimpleCrossAttnUpBlock2D", "UpBlock2D"]}, "with a SimpleCrossAttnUpBlock2D"),
        ({"_class_name": "UNetMotionModel"}, "is a UNetMotionModel. Hollow takes UNet2DConditionModel there"),
    ],
)
def test_a_unet_that_a_later_stage_could_not_take(
    configs: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    """Not after hours of training."""
    assert sentence in refused_with(configs, tmp_path, "unet/config.json", **changes)


@pytest.mark.parametrize("name", ["UNet3DConditionModel", "UNetMotionModel", "OnnxRuntimeModel"])
def test_a_unet_that_the_pipelines_index_calls_otherwise(configs: Path, tmp_path: Path, name: str) -> None:
    said = refused_with(configs, tmp_path, "model_index.json", unet=["diffusers", name])
    assert f"The unet of {tmp_path} is a {name}. Hollow takes UNet2DConditionModel there" in said


def test_a_pipeline_with_the_unet_of_another(configs: Path, tmp_path: Path) -> None:
    said = refused_with(configs, tmp_path, "model_index.json", _class_name="StableDiffusionXLPipeline")
    assert "is a StableDiffusionXLPipeline with the U-Net of another" in said


def test_parts_that_do_not_fit() -> None:
    """Where a program puts them together, too."""
    unets = make_shallow_unet("sd15", in_channels=8, out_channels=8), make_shallow_unet("sd15", time_cond_proj_dim=8)
    for unet, sentence in zip(
        unets, ("makes latents of 4 channels, but the U-Net takes 8", "has time_cond"), strict=True
    ):
        with pytest.raises(HollowError, match=sentence):
            BaseModel(unet, tiny_vae(), (), (), DDPMScheduler(), "sd15", 128)


@pytest.mark.parametrize("markers", [["edm_mean", "edm_std"], ["edm_vpred.sigma_max"]])
def test_a_file_of_edm(tmp_path: Path, markers: list[str]) -> None:
    """Playground v2.5 and CosXL, which are SDXL in all but the noise."""
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, 2048),
        "first_stage_model.a": torch.zeros(1),
        "conditioner.b": torch.zeros(1),
        **{key: torch.tensor(1.0) for key in markers},
    }
    path = single_file(tmp_path, tensors)
    assert f"holds {markers[0]}, so it learned at the noise levels of EDM" in refusal(path)
    with pytest.raises(HollowError, match=f"holds {markers[0]}"):
        outline(str(path))


def test_a_truncated_file(tmp_path: Path) -> None:
    path = single_file(tmp_path, original_checkpoint(tiny_pipeline("sd15"), "sd15"))
    path.write_bytes(path.read_bytes()[:-1000])
    assert "model.safetensors is not a whole safetensors file" in refusal(path)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            ["double_blocks.0.img_attn.norm.key_norm.scale"],
            "is no checkpoint of SD 1.x, SD 2.x or SDXL. Hollow takes these only; of a transformer (FLUX.1, Z-Image, "
            "Qwen-Image, Stable Diffusion 3.5, Krea 2, Anima) give the diffusers folder.",
        ),
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "is a LoRA, not a model"),
        (["unet.down_blocks.0.attentions.0.proj_in.lora.down.weight"], "is a LoRA, not a model"),
    ],
)
def test_a_file_of_another_kind(tmp_path: Path, keys: list[str], sentence: str) -> None:
    assert sentence in refusal(single_file(tmp_path, {key: torch.zeros(2, 2) for key in keys}))


@pytest.mark.parametrize(
    ("channels", "width", "lacking", "sentence"),
    [
        (9, 768, "", "takes 9 channels and text embeddings 768 wide, so it is for inpainting"),
        (4, 1280, "", "takes 4 channels and text embeddings 1280 wide, so it is for inpainting, a refiner"),
        (4, 768, "first_stage_model", "lacks its VAE. Get the full checkpoint"),
        (4, 1024, "cond_stage_model", "lacks its text encoder. Get the full checkpoint"),
    ],
)
def test_a_file_that_is_not_the_plain_model(
    tmp_path: Path, channels: int, width: int, lacking: str, sentence: str
) -> None:
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, channels, 3, 3),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, width),
        "first_stage_model.a": torch.zeros(1),
        "cond_stage_model.b": torch.zeros(1),
    }
    kept = {key: tensor for key, tensor in tensors.items() if not lacking or not key.startswith(lacking)}
    assert sentence in refusal(single_file(tmp_path, kept))


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("model.diffusion_model.middle_block.0.in_layers.2.weight", "does not load: "),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            "lacks weights of its text_encoder",
        ),
    ],
)
def test_a_file_that_lacks_a_weight(tmp_path: Path, key: str, sentence: str) -> None:
    pipeline = tiny_pipeline("sd15")
    tensors = original_checkpoint(pipeline, "sd15")
    del tensors[key]
    path, configs = single_file(tmp_path, tensors), save_folder(pipeline, tmp_path / "configs")
    assert sentence in refusal(path, config=configs)


def test_a_prediction_type_that_does_not_exist(tmp_path: Path) -> None:
    assert "There is no prediction type 'velocity'. Choose one of epsilon, v_prediction" in refusal(
        tmp_path, prediction_type="velocity"
    )


def test_the_embedded_models_outline_is_of_its_size() -> None:
    """Its VAE is a tiny autoencoder, whose config names its channels otherwise."""
    from hollow_core.demo.run import MODEL

    assert outline(str(MODEL)).resolution == 64


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_a_loaded_model_has_the_outline_of_its_folder(tmp_path: Path, layout: str) -> None:
    folder = save_folder(tiny_pipeline(layout), tmp_path / "model")
    expected, found = outline(str(folder), torch.bfloat16), outlines(load(folder))(torch.bfloat16)

    def told(model: BaseModel) -> list[dict[str, tuple[torch.Size, torch.dtype, torch.device]]]:
        parts = [model.unet, model.vae, *model.text_encoders]
        return [{name: (t.shape, t.dtype, t.device) for name, t in part.state_dict().items()} for part in parts]

    assert told(found) == told(expected)
    assert (found.layout, found.resolution) == (expected.layout, expected.resolution)
