"""Loading base models with transformers: tiny folders of every family, whole, and what is refused."""

import gc
import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny_transformer_pipelines import SIDE, save_tiny_pipeline
from tiny_transformers import FAMILY_NAMES
from torch import nn

from hollow_core.data.images import TrainingImage
from hollow_core.errors import HollowError
from hollow_core.models.base_model import (
    decode_images,
    encode_images,
    encode_prompt,
    free_encoders,
    keep_small,
    load,
    outline,
    outlines,
    tile_vae,
)
from hollow_core.models.transformer_model import TransformerModel
from hollow_core.nets.residency import away

PROMPT = "a photo of a sks dog"


def picture(side: int = 64) -> TrainingImage:
    """Of random colours."""
    colours = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    return TrainingImage(Image.fromarray(colours), None, "", (0, 0, side, side))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_folder_of_every_family(name: str, transformer_folder: Callable[[str], Path]) -> None:
    model = load(transformer_folder(name))
    assert isinstance(model, TransformerModel)
    assert (model.layout, model.resolution, model.pixels_per_latent, model.latent_side) == (name, SIDE, 8, SIDE // 8)
    assert not any(part.training for part in (model.module, model.vae, *model.text_encoders))
    (latents,) = encode_images(model, [picture()])
    prompt = encode_prompt(model, PROMPT)
    model.network.check_inputs("picture 1", latents, [prompt])
    assert model.network.predict(latents, [500], prompt, {}).shape == latents.shape


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_loaded_model_has_the_outline_of_its_folder(name: str, transformer_folder: Callable[[str], Path]) -> None:
    folder = transformer_folder(name)
    expected, found = outline(str(folder), torch.bfloat16), outlines(load(folder))(torch.bfloat16)

    def told(model: Any) -> list[dict[str, tuple[torch.Size, torch.dtype, torch.device]]]:
        parts = [model.module, model.vae, *model.text_encoders]
        return [{name: (t.shape, t.dtype, t.device) for name, t in part.state_dict().items()} for part in parts]

    assert told(found) == told(expected)
    assert (found.layout, found.resolution) == (expected.layout, expected.resolution)
    assert encode_prompt(found, PROMPT).encoder_hidden_states.dim() == expected.network.inputs(2, 2)[1][0].dim()


def test_prompts_are_encoded_as_the_pipeline_encodes_them(transformer_folder: Callable[[str], Path]) -> None:
    """Padding that a mask leaves out is cut off; the others are tested by the pictures."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(transformer_folder("krea2"))
    padded, mask = pipeline.encode_prompt(PROMPT, device="cpu")
    found = encode_prompt(load(transformer_folder("krea2")), PROMPT).encoder_hidden_states
    assert found.shape[1] == mask.sum() < padded.shape[1]
    torch.testing.assert_close(found[0], padded[0][mask[0]])


def test_a_prompt_is_no_longer_than_its_tokenizer_allows(transformer_folder: Callable[[str], Path]) -> None:
    model = load(transformer_folder("z-image"))
    assert encode_prompt(model, "word " * 100).encoder_hidden_states.shape[1] == model.tokenizers[0].model_max_length


@pytest.mark.parametrize("name", ["flux", "qwen-image"])
def test_pictures_become_latents_of_the_pipelines_scale(name: str, transformer_folder: Callable[[str], Path]) -> None:
    model = load(transformer_folder(name))
    (latents,) = encode_images(model, [picture()])
    pixels = torch.from_numpy(np.asarray(picture().picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        if name == "flux":
            expected = (model.vae.encode(pixels).latent_dist.mode() - 0.1159) * 0.3611
        else:
            mode = model.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
            mean, deviation = ([[[number]] for number in getattr(model.vae.config, f"latents_{it}")] for it in KINDS)
            expected = (mode - torch.tensor(mean)) / torch.tensor(deviation)
    assert latents.shape == (1, 4, 8, 8)
    torch.testing.assert_close(latents, expected)
    assert decode_images(model, [latents])[0].size == (64, 64)


KINDS = ("mean", "std")


@pytest.mark.parametrize("name", ["flux", "qwen-image"])
def test_a_tiled_vae_gives_nearly_the_same(name: str, transformer_folder: Callable[[str], Path]) -> None:
    model = load(transformer_folder(name))
    whole = encode_images(model, [picture(SIDE)])[0]
    tile_vae(model)
    tiled = encode_images(model, [picture(SIDE)])[0]
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    assert decode_images(model, [tiled])[0].size == (SIDE, SIDE)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_text_encoders_streamed_and_quantised_say_about_the_same(
    name: str, transformer_folder: Callable[[str], Path]
) -> None:
    model, small = (load(transformer_folder(name)) for _ in range(2))
    expected = encode_prompt(model, PROMPT)
    keep_small(model, "cpu", streaming=True)
    assert all(away(encoder) for encoder in model.text_encoders)
    streamed = encode_prompt(model, PROMPT)
    torch.testing.assert_close(streamed.encoder_hidden_states, expected.encoder_hidden_states, rtol=1e-5, atol=1e-6)
    keep_small(small, "cpu", base_bits=8)
    found, whole = encode_prompt(small, PROMPT).encoder_hidden_states, expected.encoder_hidden_states
    assert 0 < (found - whole).norm() / whole.norm() < 0.05


def test_encoders_leave_memory(transformer_folder: Callable[[str], Path]) -> None:
    model = load(transformer_folder("sd3"))
    encode_prompt(model, PROMPT)
    gone = [weakref.ref(part) for part in (model.vae, *model.text_encoders)]
    free_encoders(model)
    gc.collect()
    assert [part() for part in gone] == [None] * 4
    with pytest.raises(HollowError, match=r"text encoder was set free already\. Encode all prompts before"):
        encode_prompt(model, "a dog")
    with pytest.raises(HollowError, match=r"VAE was set free already\. Encode all pictures before"):
        encode_images(model, [])


@pytest.mark.parametrize(
    ("name", "side", "shift"),
    [
        ("sd3", 64, 3.0),  # whatever the size
        ("flux", 64, math.exp(0.5)),  # 16 tokens, where its line begins, and 64, where it ends
        ("flux", 128, math.exp(1.15)),
        ("krea2", 96, math.exp(0.5 + (1.15 - 0.5) * (36 - 16) / (64 - 16))),
    ],
)
def test_noise_levels_are_shifted_as_the_folder_tells(
    name: str, side: int, shift: float, transformer_folder: Callable[[str], Path]
) -> None:
    model = load(transformer_folder(name))
    schedule = model.schedule_for(None, side)
    assert (schedule.density, schedule.shift) == ("logit-normal", pytest.approx(shift))
    assert model.schedule_for("uniform", side).id != model.schedule_for("logit-normal", side).id != schedule.id
    assert model.schedule_for("logit-normal", side).shift == 1


def changed(folder: Path, to: Path, index: str = "model_index.json", **entries: Any) -> Path:
    shutil.copytree(folder, to)
    content = json.loads((to / index).read_text()) | entries
    (to / index).write_text(json.dumps({name: entry for name, entry in content.items() if entry is not None}))
    return to


def test_a_distilled_one_has_its_own_shift(transformer_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(changed(transformer_folder("krea2"), tmp_path / "turbo", is_distilled=True))
    assert model.schedule_for(None, 64).shift == pytest.approx(math.exp(1.15))


def test_an_autoencoder_tiny_and_half_precision(transformer_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """As the embedded transformer has it."""
    folder = changed(transformer_folder("z-image"), tmp_path / "model", vae=["diffusers", "AutoencoderTiny"])
    shutil.rmtree(folder / "vae")
    channels = {"encoder_block_out_channels": (4, 4, 4, 4), "decoder_block_out_channels": (4, 4, 4, 4)}
    AutoencoderTiny(**channels, num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1)).save_pretrained(
        folder / "vae"
    )
    model = load(folder, torch.bfloat16)
    assert {part.dtype for part in (model.module, model.vae, *model.text_encoders)} == {torch.bfloat16}
    tile_vae(model)
    (latents,) = encode_images(model, [picture()])
    assert latents.shape == (1, 4, 8, 8)
    assert decode_images(model, [latents])[0].size == (64, 64)


def test_a_folder_in_half_precision_only(tmp_path: Path) -> None:
    folder = save_tiny_pipeline("flux", tmp_path / "model")
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_suffix(f".fp16{file.suffix}"))
    assert isinstance(load(folder), TransformerModel)


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(HollowError) as refused:
        load(path, **options)
    return str(refused.value)


def test_what_a_folder_lacks(transformer_folder: Callable[[str], Path], tmp_path: Path) -> None:
    whole = transformer_folder("z-image")
    assert "lacks its vae. Get the whole Z-Image" in refusal(changed(whole, tmp_path / "a", vae=[None, None]))
    shutil.rmtree(changed(whole, tmp_path / "b") / "tokenizer")
    assert "lacks its tokenizer. Get the whole Z-Image" in refusal(tmp_path / "b")
    shutil.rmtree(changed(whole, tmp_path / "c") / "transformer")
    assert f"{Path('c', 'transformer')} does not load: " in refusal(tmp_path / "c")
    old = changed(whole, tmp_path / "d", transformer=["diffusers", "ZImage9Transformer"])
    assert "needs diffusers with ZImage9Transformer, which this installation has not. Update" in refusal(old)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_folder_that_lacks_a_weight(part: str, transformer_folder: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = changed(transformer_folder("z-image"), tmp_path / "model")
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    lost = next(name for name in tensors if "attention" in name or "self_attn" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file, {"format": "pt"})
    assert f"lacks weights, such as {lost}" in refusal(folder)


def test_a_folder_of_pickles_is_never_read(transformer_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = changed(transformer_folder("z-image"), tmp_path / "model")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "transformer" / "diffusion_pytorch_model.bin")
    assert "does not load: " in refusal(folder)


def test_it_has_no_prediction_type(transformer_folder: Callable[[str], Path]) -> None:
    sentence = "Z-Image learned flow matching, so it has no prediction type 'epsilon'"
    assert sentence in refusal(transformer_folder("z-image"), prediction_type="epsilon")


def test_a_public_layout_is_of_its_native_size() -> None:
    model = outline("anima", torch.bfloat16)
    assert isinstance(model.text_encoders[0], nn.Module)
    assert isinstance(model.scheduler, FlowMatchEulerDiscreteScheduler)
    assert model.resolution == 1024


@pytest.mark.parametrize("name", ["flux", "qwen-image"])
def test_a_network_for_fills_is_refused(name: str, transformer_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """It takes a mask and a picture beside the latents."""
    shutil.copytree(transformer_folder(name), tmp_path, dirs_exist_ok=True)
    config = tmp_path / "transformer" / "config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"in_channels": 6 * told["in_channels"]}))
    with pytest.raises(HollowError, match=r"makes latents of 4 channels, but .* takes 24\. Take the plain"):
        outline(str(tmp_path))


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "FlowMatchLCMScheduler"])
def test_a_transformer_on_another_noise_is_refused(
    scheduler: str, transformer_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(transformer_folder("z-image"), tmp_path, dirs_exist_ok=True)
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": scheduler}))
    for asked in (load, lambda path: outline(str(path))):
        with pytest.raises(HollowError, match=f"has the scheduler {scheduler}, but Hollow trains transformers on flow"):
            asked(tmp_path)
