"""What a file says of itself: enough for every tool, through every conversion, and nothing private."""

import base64
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_unets import make_tiny_unet
from torch import Tensor

from hollow_core.errors import HollowError
from hollow_core.lora import file as lora_file
from hollow_core.lora.delta import LoraLayer
from hollow_core.lora.dialects import Lora, weight_shapes
from hollow_core.lora.file import read
from hollow_core.lora.metadata import Recipe, layout_of, recipe_of, thumbnail
from hollow_core.lora.privacy import without_paths
from hollow_core.models.layouts import layout_config

CONFIG = dict(make_tiny_unet("sdxl").config)
RECIPE = Recipe(2, "sks", "dog", "a photo of a sks dog", "a photo of a dog", "v_prediction")
PLACE = "mid_block.attentions.0.proj_in"


def state() -> dict[str, Tensor]:
    out, into = weight_shapes(CONFIG)[PLACE]
    return {f"{PLACE}.lora_A.weight": torch.ones(2, into), f"{PLACE}.lora_B.weight": torch.ones(out, 2)}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_it_survives_every_conversion(tmp_path: Path) -> None:
    path = tmp_path / "rex.safetensors"
    picture = Image.new("RGB", (640, 480), "red")
    lora_file.save(path, state(), CONFIG, alpha=1, layout="sdxl", recipe=RECIPE, picture=picture)
    before = metadata_of(path)
    for dialect in ("comfy", "diffusers", "peft", "kohya"):
        name = "a" if dialect == "peft" else f"{dialect}.safetensors"
        path = lora_file.convert(path, tmp_path / name, dialect, config=CONFIG).path
    after = metadata_of(path)
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {"ss_network_alpha"}  # peft's is the rank
    assert recipe_of(after) == RECIPE
    assert after["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (after["modelspec.title"], after["modelspec.trigger_phrase"]) == ("rex", "sks dog")
    assert layout_of(after) == "sdxl"


def foreign(tmp_path: Path, metadata: dict[str, str]) -> Path:
    """A file of another tool."""
    out, into = weight_shapes(CONFIG)[PLACE]
    lora = Lora("kohya", {PLACE: LoraLayer(torch.ones(2, into), torch.ones(out, 2), 2.0)}, {}, ())
    return lora_file.write_dialect(tmp_path / "foreign.safetensors", lora, CONFIG, metadata).path


def test_nothing_private_comes_along(tmp_path: Path) -> None:
    """Neither kohya's lists of folders nor any other absolute path, nor what was true of the old bytes only."""
    private = {
        "ss_sd_model_name": r"C:\Users\jane\models\sdxl.safetensors",
        "ss_vae_name": "/home/jane/vae.safetensors",
        "ss_datasets": json.dumps([{"image_dir": "janes-cat"}]),
        "ss_dataset_dirs": json.dumps({"janes-cat": {"n_repeats": 1}}),
        "ss_training_comment": "for jane",
        "ss_network_args": json.dumps({"weights": "~/jane/start.safetensors"}),
        "modelspec.description": "see \\\\server\\jane",
        "sshs_model_hash": "0123",
        "modelspec.hash_sha256": "0x0123",
    }
    kept = {
        "ss_tag_frequency": json.dumps({"5_sks cat": {"sks cat": 5}}),
        "ss_epoch": "3",
        "modelspec.author": "Jane",
        "modelspec.license": "https://creativecommons.org/licenses/by/4.0",
        "modelspec.usage_hint": "a cat and/or a dog, 1 / 2",
        **thumbnail(Image.new("RGB", (8, 8))),
    }
    source = foreign(tmp_path, private | kept)
    written = metadata_of(lora_file.convert(source, tmp_path / "b.safetensors", "comfy", config=CONFIG).path)
    assert not private.keys() & written.keys()
    assert kept.items() <= written.items()
    assert "jane" not in json.dumps({key: value for key, value in written.items() if key not in kept})


PATHS = r"""/home/jane/rex
~/rex
~jane/rex
C:\Users\jane
c:/Users/jane
trained from D:\jane, on a laptop
\\server\share\jane
\\wsl$\Ubuntu\jane
\\?\C:\jane
//server/share/jane
file:///home/jane/rex
FILE:///C:/jane
file://server/jane
smb://nas/jane
%2Fhome%2Fjane
C%3A%5CUsers%5Cjane
file:%252F%252Fhome%252Fjane
%USERPROFILE%\models
$HOME/models
${HOME}/models
$env:APPDATA\models
http://127.0.0.1:7860/file=/Users/jane/a.png
jane@server:/data/rex
{'weights': '/home/jane/rex'}
PosixPath('/mnt/jane')
a（/home/jane/rex）""".splitlines()

HARMLESS = r"""a cat and/or a dog, 1 / 2, 24/7
https://creativecommons.org/licenses/by/4.0
https://example.com/home/jane
saber \(fate\)
saber \\(fate\\)
<p>a <b>dog</b></p>
\o/ :/ =/ d:/, \m/ >:/
models/rex.safetensors
50% / 50%, ~5/10, $5/month, 12/11/2024
100%25""".splitlines()


@pytest.mark.parametrize("text", PATHS)
def test_a_path_of_any_kind_is_left_out_wherever_it_stands(text: str) -> None:
    """Alone, in JSON of which the rest stays, as a name, and in JSON within JSON."""
    inner = json.dumps({"a": text, "b": 1})
    told = {"plain": text, "list": json.dumps([text, "kept"]), "inner": json.dumps({"c": inner}), text: "kept"}
    told |= {"names": json.dumps({text: 1, "kept": 2}), "twice": f'{{"a": {json.dumps(text)}, "a": 3}}'}
    assert without_paths(told) == {
        "list": '["kept"]',
        "inner": json.dumps({"c": json.dumps({"b": 1})}),
        "names": '{"kept": 2}',
        "twice": '{"a": 3}',
    }


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_a_path_stays_letter_by_letter(text: str) -> None:
    told = {"plain": text, "tags": f'{{"5_sks cat" :  {{ {json.dumps(text)}: 1.50 }} }}', "odd": '["' + text}
    assert without_paths(told) == told


@pytest.mark.parametrize("piece", ["a", "/", "\\", "%", ":/", "[", '{"a":', "%25", " /", "C:"])
def test_long_runs_of_anything_are_gone_through(piece: str) -> None:
    """Beyond what trainers write, they are left out unread."""
    short = piece * 20_000
    assert without_paths({"run": short}).keys() <= {"run"}
    assert without_paths({"run": piece * 10**7, "title": "rex"}).keys() <= {"title"}


@pytest.mark.slow
def test_the_shapes_win_over_what_a_file_says_it_is_for(tmp_path: Path) -> None:
    """So that the conversion says one thing; what is true of the base model stays as it was said."""
    out, into = weight_shapes(layout_config("sdxl"))[PLACE.replace("proj_in", "transformer_blocks.0.attn2.to_k")]
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k"
    source = tmp_path / "a.safetensors"
    tensors = {f"{name}.lora_down.weight": torch.ones(1, into), f"{name}.lora_up.weight": torch.ones(out, 1)}
    for version, architecture in (
        ("sd_v1", "stable-diffusion-v1/lora"),
        ("sd_v2", "stable-diffusion-v1/lora"),
        ("flux1", "flux-1-dev/lora"),
    ):
        false = {"ss_base_model_version": version, "modelspec.architecture": architecture, "ss_v2": "True"}
        save_file(tensors, source, false | {"modelspec.author": "Jane"})
        written = metadata_of(lora_file.convert(source, tmp_path / "b.safetensors", "comfy").path)
        assert written["ss_base_model_version"] == "sdxl_base_v1-0"
        assert written["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
        assert (written["ss_v2"], written["modelspec.author"]) == ("False", "Jane")
    deep = name.replace("blocks_0_attn2_to_k", "blocks_9_attn1_to_k")  # by its name alone
    save_file(
        {f"{deep}.lora_down.weight": torch.ones(1, out), f"{deep}.lora_up.weight": torch.ones(out, 1)}, source, false
    )
    assert read(source)[0].layers.keys() == {PLACE.replace("proj_in", "transformer_blocks.9.attn1.to_k")}
    save_file(tensors, source, {"ss_base_model_version": "sdxl_base_v0-9"})
    written = metadata_of(lora_file.convert(source, tmp_path / "b.safetensors").path)
    assert written["ss_base_model_version"] == "sdxl_base_v0-9"


def test_the_same_lora_is_always_the_same_file(tmp_path: Path) -> None:
    files = []
    for _ in range(4):
        lora_file.save(
            tmp_path / "rex.safetensors", state(), CONFIG, alpha=1, layout="sdxl", recipe=RECIPE, metadata={"é": '"\n'}
        )
        files.append((tmp_path / "rex.safetensors").read_bytes())
    assert len(set(files)) == 1
    assert metadata_of(tmp_path / "rex.safetensors")["é"] == '"\n'


def test_a_file_that_said_nothing_is_filed_under_its_base(tmp_path: Path) -> None:
    written = metadata_of(
        lora_file.convert(foreign(tmp_path, {}), tmp_path / "b.safetensors", "kohya", config=CONFIG).path
    )
    assert written["ss_base_model_version"] == "sdxl_base_v1-0"
    assert written["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (written["ss_network_module"], written["ss_network_dim"]) == ("networks.lora", "2")
    assert written["modelspec.title"] == "b"


def test_the_thumbnail_is_small_and_holds_no_more_than_the_picture() -> None:
    camera, exif = io.BytesIO(), Image.Exif()
    exif[0x010F] = "Jane's camera"
    Image.new("RGBA", (900, 600), "blue").convert("RGB").save(camera, "JPEG", exif=exif, comment=b"taken by Jane")
    data = thumbnail(Image.open(camera))["modelspec.thumbnail"]
    assert data.startswith("data:image/jpeg;base64,")
    jpeg = base64.b64decode(data.partition(",")[2])
    assert b"Jane" not in jpeg
    with Image.open(io.BytesIO(jpeg)) as picture:
        assert (picture.format, picture.size) == ("JPEG", (256, 171))


@pytest.mark.parametrize(
    ("metadata", "layout"),
    [
        ({"ss_base_model_version": "sd_v1"}, "sd15"),
        ({"ss_base_model_version": "sd_v2"}, "sd21"),
        ({"ss_base_model_version": "sdxl_base_v0-9"}, "sdxl"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd21"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
    ],
)
def test_the_family_is_told_by_the_metadata_where_shapes_do_not(metadata: dict[str, str], layout: str) -> None:
    assert layout_of(metadata, {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 1280)}) == layout


def test_a_file_that_does_not_tell_its_family_is_refused(tmp_path: Path) -> None:
    sentence = r"The LoRA's base model is not named\. Give the model that it belongs to\."
    source = tmp_path / "a.safetensors"
    lora_file.save(source, state(), CONFIG, alpha=1, layout="other", recipe=RECIPE)
    with pytest.raises(HollowError, match=sentence):
        lora_file.convert(source, tmp_path / "b.safetensors", "kohya")


@pytest.mark.parametrize("value", ["", "[", '"three"', "1.5", "true", "[" * 100_000])
def test_a_damaged_recipe_is_none(value: str, tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    lora_file.save(source, state(), CONFIG, alpha=1, layout="sdxl", recipe=RECIPE)
    assert recipe_of(metadata_of(source)) == RECIPE
    assert recipe_of(metadata_of(source) | {"hollow.cut": value}) is None
    assert recipe_of({}) is None
