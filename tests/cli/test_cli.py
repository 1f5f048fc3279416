"""The command as a user types it: results on stdout, one sentence on stderr where something is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipelines import shallow_pipeline, tiny_pipeline
from typer.main import get_command

from hollow_core.cli import main
from hollow_core.cli.app import app
from hollow_core.cli.options import Prediction
from hollow_core.cli.sample import lora_files
from hollow_core.cli.watch import stopping
from hollow_core.nets.schedule import PREDICTIONS

Hollow = Callable[..., "Done"]


class Done(NamedTuple):
    status: object
    stdout: str
    stderr: str


@pytest.fixture
def hollow(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run the command with these arguments."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["hollow", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return Done(end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline("sd15").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shallow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shallow")
    shallow_pipeline("sd15").save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "my photos"  # a space, as on users' disks
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (150, 130), (90 * number, 60, 200)).save(folder / f"{number}.jpg")
    return folder


@pytest.mark.slow
def test_cuts_prints_the_papers_seven_percentages(hollow: Hollow) -> None:
    done = hollow("cuts", "sd21", "--json")
    assert done.status == 0, done.stderr
    rows = json.loads(done.stdout)
    published = [11.5, 20.8, 30.1, 39.2, 56.6, 73.3, 84.3]
    assert [row["k"] for row in rows[:7]] == list(range(7))
    assert [row["removed_percent"] for row in rows[:7]] == pytest.approx(published, abs=0.1)
    assert rows[3]["blocks"][0] == "3-3"
    assert rows[3]["blocks"][-1] == "6-4"
    assert rows[3]["exit_shape"] == [1280, 16, 16]
    assert set(rows[3]["flops"]) == {"full", "precompute", "hollowed_forward", "training_step"}


@pytest.mark.slow
def test_cuts_of_a_model_are_a_table(hollow: Hollow, model_folder: Path) -> None:
    done = hollow("cuts", model_folder)
    assert done.status == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "│" in line]
    assert len(rows) == 12  # cuts 0 to 11
    assert "3-3 … 6-4" in rows[3]


def test_predictions_can_be_named_as_the_library_knows_them() -> None:
    assert [each.value for each in Prediction] == list(PREDICTIONS)


@pytest.mark.slow
def test_train_then_sample(hollow: Hollow, model_folder: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "my lora"
    train = ["train", model_folder, "--images", photos, "--subject", "dog", "--out", out, "--device", "cpu"]
    train += ["--steps", 3, "--samples", 4, "--rank", 2, "--resolution", 128]
    train += ["--base-bits", 8, "--stream", "--fused-backward", "--max-grad-norm", "inf"]
    done = hollow(*train, "--json")
    assert done.status == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["file"] == str(out / "lora.safetensors")
    assert result["stopped"] == "finished"
    assert result["largest_change"] > 0
    assert "every key matched; the largest |ΔW| is" in done.stderr
    assert {stage["name"] for stage in result["stages"]} == {"encode", "precompute", "train"}

    pictures = tmp_path / "pictures"
    draw = [
        "sample",
        model_folder,
        "--lora",
        out / "lora.safetensors",
        "--prompt",
        "a sks dog in snow",
        "--device",
        "cpu",
    ]
    done = hollow(*draw, "--out", pictures, "--steps", 2, "--images", 2, "--json")
    assert done.status == 0, done.stderr
    drawn = json.loads(done.stdout)
    assert [picture["seed"] for picture in drawn] == [0, 1]
    for picture in drawn:
        with Image.open(picture["file"]) as opened:
            assert opened.size == (128, 128)
    assert "does not read" not in done.stderr

    draw[draw.index("a sks dog in snow")] = "a photo, " * 40 + "of a sks dog"
    done = hollow(*draw, "--out", pictures, "--steps", 1)
    assert "does not read as far as the identifier in 'a photo, a photo," in done.stderr
    assert "or take --prompt-chunks 2." in done.stderr


@pytest.mark.slow
def test_what_is_read_of_a_folder_is_said(hollow: Hollow, shallow_folder: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "0.jpg.txt").write_text("a sks dog")
    (photos / "notes.md").touch()
    (photos / "old").mkdir()
    Image.new("RGB", (150, 130)).save(photos / "old" / "2.jpg")
    done = hollow("train", shallow_folder, "--images", photos, "--subject", "dog", "--resolution", 128, "--plan-only")
    assert done.status == 0, done.stderr
    assert "Captions for 1 of 2 pictures.\n" in done.stderr
    assert "Not read: notes.md." in done.stderr
    assert "Not looked into: old." in done.stderr


@pytest.mark.slow
def test_several_loras_draw_the_same_into_a_grid(
    hollow: Hollow, shallow_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named one by one, by a shell's expansion or by a pattern; in the order of their numbers."""
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    unet = UNet2DConditionModel.from_pretrained(shallow_folder, subfolder="unet")
    up, down = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.shape
    for number in (9, 10):
        tensors = {f"{name}.lora_down.weight": torch.ones(1, down), f"{name}.lora_up.weight": torch.ones(up, 1)}
        save_file(tensors, tmp_path / f"rex-{number}.safetensors")
    monkeypatch.chdir(tmp_path)
    draw = ["--prompt", "a sks dog", "--prompt", "a sks cat", "--steps", 1, "--device", "cpu", "--json"]
    drawn = []
    for number, asked in enumerate(
        (
            ["--lora", "rex-10.safetensors", "--lora", "rex-9.safetensors"],
            ["--lora", "rex-10.safetensors", "rex-9.safetensors"],
            ["--lora", "rex-*.safetensors"],
        )
    ):
        done = hollow("sample", shallow_folder, *asked, *draw, "--out", f"out{number}", *(["--grid"] if number else []))
        assert done.status == 0, done.stderr
        drawn.append([(Path(row["file"]).name, row["lora"], row["prompt"]) for row in json.loads(done.stdout)])
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[0] == [
        ("rex-9-000-seed0.png", "rex-9.safetensors", "a sks dog"),
        ("rex-9-001-seed0.png", "rex-9.safetensors", "a sks cat"),
        ("rex-10-000-seed0.png", "rex-10.safetensors", "a sks dog"),
        ("rex-10-001-seed0.png", "rex-10.safetensors", "a sks cat"),
    ]
    assert sorted(path.name for path in Path("out2").iterdir()) == sorted(["grid.png", *(row[0] for row in drawn[0])])
    assert not Path("out0/grid.png").exists()
    done = hollow("sample", shallow_folder, "--lora", "max-*.safetensors", *draw)
    assert done.status == 1
    assert "There is no file max-*.safetensors." in done.stderr


@pytest.fixture(scope="module")
def sd15_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of SD1.5's true shape on one block outside every hollow and on the middle, where it changes little."""
    file, tensors = tmp_path_factory.mktemp("lora") / "rex.safetensors", {}
    generator = torch.Generator().manual_seed(0)
    for block, width, gain in (("down_blocks_0_attentions_0", 320, 1e-2), ("mid_block_attentions_0", 1280, 1e-5)):
        name = f"lora_unet_{block}_transformer_blocks_0_attn2_to_k"
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, 768, generator=generator)
        tensors[f"{name}.lora_up.weight"] = gain * torch.randn(width, 2, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, file)
    return file


@pytest.mark.slow
def test_analyze_shows_blocks_and_recommends_a_cut(hollow: Hollow, sd15_lora: Path, tmp_path: Path) -> None:
    chart = tmp_path / "chart.png"
    done = hollow("analyze", sd15_lora, "--out", chart, "--json")
    assert done.status == 0, done.stderr
    result = json.loads(done.stdout)
    blocks = {row["slot"]: row for row in reversed(result["loras"][0]["blocks"])}
    assert blocks["IN01"]["module"] == "down_blocks.0.attentions.0"
    assert blocks["IN01"]["mean"] > 100 * blocks["MID"]["mean"] > 0
    assert blocks["IN02"]["mean"] is None
    (suggested,) = result["suggestions"]
    assert suggested["cut"] == 10  # all but 1-1, 9-2, 9-3 and conv_in
    assert suggested["block_weights"] == "1,1,0,0,0,0,0,0,0,0,0,0,0,0,0,1,1"
    assert suggested["training_bytes"]["hollowed"] < suggested["training_bytes"]["whole"]
    with Image.open(chart) as drawn:
        assert drawn.width > 1000


@pytest.fixture(scope="module")
def middle_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny model, on its middle."""
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({f"{name}.lora_down.weight": torch.ones(1, 12), f"{name}.lora_up.weight": torch.ones(24, 1)}, file)
    return file


@pytest.mark.slow
def test_scale_halves_a_block_and_analyze_compares(
    hollow: Hollow, model_folder: Path, middle_lora: Path, tmp_path: Path
) -> None:
    half, none = tmp_path / "half.safetensors", tmp_path / "none.safetensors"
    for file, blocks in ((half, ["MID=0.5"]), (none, ["MID=2", "5-1=0"])):
        options = [word for block in blocks for word in ("--block", block)]
        done = hollow("scale", middle_lora, file, *options, "--model", model_folder, "--json")
        assert done.status == 0, done.stderr
        assert json.loads(done.stdout)["path"] == str(file)
    assert "so it has NO effect" in done.stderr
    done = hollow("analyze", middle_lora, half, "--model", model_folder)
    assert done.status == 0, done.stderr
    row = next(line.split() for line in done.stdout.splitlines() if "5-1" in line)
    assert row == ["5-1", "MID", "mid_block.attentions.0", "1.00e+00", "5.00e-01"]
    done = hollow("analyze", middle_lora, half, none, "--model", model_folder)
    assert done.status == 0, done.stderr
    row = next(line.split() for line in done.stdout.splitlines() if "5-1" in line)
    assert row[3:] == ["5.00e-01", "4.1e-01"]
    module = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert f"none.safetensors: {module} has no effect: its up matrix is all zero." in done.stderr


def test_analyze_draws_with_each_block_off(
    hollow: Hollow, model_folder: Path, middle_lora: Path, tmp_path: Path
) -> None:
    out = tmp_path / "off.png"
    asked = ["analyze", middle_lora, "--model", model_folder, "--ablate", out, "--prompt", "a cup", "--steps", 1]
    done = hollow(*asked, "--device", "cpu", "--json")
    assert done.status == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["influence"]) == {"5-1"}
    assert result["loras"][0]["whole"]["relative"] > 0
    assert out.exists()
    done = hollow("analyze", middle_lora, "--ablate", out)
    assert done.status == 1
    assert "To ablate takes one file, its --model and a --prompt." in done.stderr


@pytest.mark.slow
def test_what_is_not_for_the_unet_is_left_out_on_request(
    hollow: Hollow, model_folder: Path, middle_lora: Path, tmp_path: Path
) -> None:
    """A text encoder's layers and embeddings; what else a file changes is told before any figure."""
    lora, out = tmp_path / "a.safetensors", tmp_path / "out"
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    more = {f"{text}.lora_down.weight": torch.ones(1, 12), f"{text}.lora_up.weight": torch.ones(12, 1)}
    save_file(load_file(middle_lora) | more | {"bundle_emb.sks.clip_l": torch.ones(1, 12)}, lora)
    sample = ["sample", model_folder, "--lora", lora, "--prompt", "a cup", "--steps", 1, "--device", "cpu"]
    ablate = ["analyze", lora, "--model", model_folder, "--ablate", out / "off.png", "--prompt", "a cup", "--steps", 1]
    commands = [
        [*sample, "--out", out],
        [*ablate, "--device", "cpu", "--json"],
        ["convert", lora, out / "b.safetensors", "--to", "diffusers", "--model", model_folder],
        ["scale", lora, out / "c.safetensors", "--block", "MID=0.5", "--model", model_folder],
    ]
    for command in commands:
        done = hollow(*command)
        assert done.status == 1, command[0]
        assert "bundle_emb.sks.clip_l, an embedding," in done.stderr, command[0]
        assert "(--unet-only)" in done.stderr, command[0]
    assert not out.exists()
    for command in commands:
        done = hollow(*command, "--unet-only")
        assert done.status == 0, (command[0], done.stderr)
    assert sorted(path.name for path in out.iterdir()) == ["000-seed0.png", "b.safetensors", "c.safetensors", "off.png"]
    assert "1 layers of the U-Net, every key matched" in done.stderr
    save_file(load_file(middle_lora) | {"lora_unet_conv_norm_out.w_norm": torch.ones(8)}, lora)
    done = hollow("analyze", lora, "--model", model_folder)
    assert done.status == 0, done.stderr
    assert "which no figure here counts" in done.stderr.split("Which cut")[0]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("gone.safetensors", None, "does not exist. Check the path."),
        ("cut.safetensors", b"\x90\x00\x00\x00\x00\x00\x00\x00{", "is not a whole safetensors file"),
        ("rex.safetensors", b"", "is not a whole safetensors file"),
    ],
)
def test_analyze_says_what_is_wrong_with_a_file(
    hollow: Hollow, tmp_path: Path, name: str, content: bytes | None, sentence: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    done = hollow("analyze", file)
    assert done.status == 1
    assert sentence in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("model_index.json", [], "model_index.json is no JSON object but a list. Get it again."),
        ("unet/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "unet is quantised on disk"),
        ("text_encoder/config.json", {"vocab_size": 49409}, "has 49408 tokens, its text encoder 49409"),
        ("tokenizer", None, "lacks its tokenizer. Get the whole model."),
    ],
)
def test_every_command_says_the_same_of_a_broken_model(
    hollow: Hollow, shallow_folder: Path, photos: Path, tmp_path: Path, file: str, content: Any, sentence: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(shallow_folder, model)
    if content is None:
        shutil.rmtree(model / file)
    else:
        known = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(known | content if content else content))
    encoder = model / "text_encoder" / "model.safetensors"
    if file.startswith("text_encoder"):
        tensors = load_file(encoder)
        name = next(name for name in tensors if name.endswith("token_embedding.weight"))
        save_file(tensors | {name: torch.zeros(49409, tensors[name].shape[1])}, encoder, {"format": "pt"})
    lora = tmp_path / "lora.safetensors"
    place = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({f"{place}.lora_down.weight": torch.ones(2, 12), f"{place}.lora_up.weight": torch.ones(24, 2)}, lora)
    for command in (
        ["train", model, "--images", photos, "--subject", "dog", "--out", tmp_path / "out", "--device", "cpu"],
        ["sample", model, "--lora", lora, "--prompt", "a sks dog", "--out", tmp_path / "out", "--device", "cpu"],
        ["plan", model],
        ["cuts", model],
        ["analyze", lora, "--model", model],
    ):
        done = hollow(*command)
        assert done.status == 1
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_train_selectively_counts_its_steps(hollow: Hollow, model_folder: Path, photos: Path, tmp_path: Path) -> None:
    train = [
        "train",
        model_folder,
        "--images",
        photos,
        "--subject",
        "dog",
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
    ]
    train += ["--steps", 4, "--samples", 4, "--rank", 2, "--resolution", 128, "--low-resolution", 64]
    done = hollow(
        *train, "--strategy", "selective", "--gamma", 20, "--zo-queries", 1, "--zo-timesteps", 500, 900, "--json"
    )
    assert done.status == 0, done.stderr
    rows = json.loads(done.stdout)["steps_by_time"]
    assert sum(row["bp-low"] + row["zo-high"] for row in rows) == 4
    assert sum(row["zo-high"] for row in rows) == sum(row["zo-high"] for row in rows if 500 <= row["from"] < 900) > 0
    assert (tmp_path / "out" / "schedule.png").exists()


def test_convert_says_what_the_written_file_holds(hollow: Hollow, model_folder: Path, tmp_path: Path) -> None:
    """Of a public family without more ado; of any other model with --model."""
    place = "mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    for width, text, model in ((1280, 768, []), (24, 12, ["--model", model_folder])):
        lora = tmp_path / f"{width}.safetensors"
        down, up = torch.full((2, text), 0.5), torch.full((width, 2), 0.25)
        save_file({f"lora_unet_{place}.lora_down.weight": down, f"lora_unet_{place}.lora_up.weight": up}, lora)
        done = hollow("convert", lora, tmp_path / "out.safetensors", "--to", "comfy", "--dtype", "fp32", *model)
        assert done.status == 0, done.stderr
        assert "(comfy): 1 layers of the U-Net, every key matched; the largest |ΔW| is 0.25." in done.stderr
        done = hollow("convert", lora, tmp_path / "peft", "--to", "peft", "--zero-pad", "--json", *model)
        assert done.status == 0, done.stderr
        told = json.loads(done.stdout)
        assert told == {
            "path": str(tmp_path / "peft"),
            "dialect": "peft",
            "layers": 16,
            "text_layers": 0,
            "largest": 0.25,
            "dora": False,
            "network": "the U-Net",
        }
        done = hollow("convert", tmp_path / "peft", tmp_path / "back.safetensors", *model)
        assert "back.safetensors (kohya): 16 layers" in done.stderr


def refusals(folder: Path, photos: Path, model_folder: Path) -> dict[str, tuple[list[object], str]]:
    """{what is wrong: (arguments, part of the sentence)}"""
    empty = folder / "empty"
    empty.mkdir()
    text = folder / "text"
    text.mkdir()
    (text / "photo.png").write_text("not a picture")
    dot = folder / "dot"
    dot.mkdir()
    Image.new("RGB", (1, 1)).save(dot / "dot.png")
    foreign = folder / "foreign.safetensors"
    pipeline = tiny_pipeline("sdxl")
    name = "lora_unet_down_blocks_2_attentions_0_transformer_blocks_0_attn1_to_q"
    width = pipeline.unet.down_blocks[2].attentions[0].transformer_blocks[0].attn1.to_q.weight.shape[1] + 1
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(width, 2)}, foreign
    )
    long = folder / "long"
    long.mkdir()
    Image.new("RGB", (128, 128)).save(long / "rex.png")
    (long / "rex.txt").write_text("a photo, " * 40 + "of a sks dog")
    cut_off = folder / "cut-off.safetensors"
    cut_off.write_bytes(foreign.read_bytes()[:-10])

    def train(**options: object) -> list[object]:
        asked = {"images": photos, "subject": "dog", "out": folder / "out"} | options
        return ["train", model_folder, *(part for name, value in asked.items() for part in (f"--{name}", value))]

    def sample(lora: Path) -> list[object]:
        return ["sample", model_folder, "--lora", lora, "--prompt", "a sks dog", "--out", folder / "out"]

    return {
        "an empty folder": (train(images=empty), "holds no pictures"),
        "a text file named .png": (train(images=text), "cannot be read as a picture"),
        "a picture of one pixel": (train(images=dot), "is only 1×1 pixels"),
        "an identifier behind the last token": (
            train(images=long),
            "does not read as far as 'sks' in the caption of",
        ),
        "an empty class word": (train(subject=" "), "The class word is empty"),
        "a cut that is not there": (train(cut=12), "Choose a cut from 0 to 11"),
        "a rank of nothing": (train(rank=0), "rank is 0"),
        "no queries": (train(strategy="zo", **{"zo-queries": 0}), "zo_queries is 0"),
        "no smaller pictures": (
            train(strategy="selective", resolution=128, **{"low-resolution": 128}),
            "The low resolution 128 is not below the pictures' 128",
        ),
        "a fused step that clips": ([*train(), "--fused-backward"], "does not go with max_grad_norm 1.0"),
        "all held out": ([*train(), "--hold-out", 1], "--hold-out 1 leaves no picture to learn. Give 2"),
        "no model": (["train", folder / "nowhere", "--images", photos, "--subject", "dog"], "does not exist"),
        "a LoRA of another architecture": (sample(foreign), "was made for another kind of model"),
        "a truncated LoRA": (sample(cut_off), "is not a whole safetensors file"),
        "a LoRA that is not there": (sample(folder / "nothing.safetensors"), "does not exist"),
        "a conversion of an unknown model's": (
            ["convert", foreign, folder / "a.safetensors"],
            "base model is not named",
        ),
        "a conversion for another model": (
            ["convert", foreign, folder / "a.safetensors", "--model", model_folder],
            "was made for another kind of model",
        ),
        "no denoising steps": ([*sample(cut_off), "--steps", 0], "0 denoising steps cannot be. Take from 1 to 1000"),
        "no such size": ([*sample(cut_off), "--width", 500], "500 is no multiple of 8 pixels"),
        "no such device": ([*sample(cut_off), "--device", "gpu"], "There is no device 'gpu' for PyTorch"),
        "no such layout": (["cuts", "sd99"], "does not exist"),
    }


@pytest.mark.slow
def test_bad_input_is_one_sentence_and_nothing_is_written(
    hollow: Hollow, model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    before = None
    for what, (arguments, sentence) in refusals(tmp_path, photos, model_folder).items():
        before = before or sorted(tmp_path.rglob("*"))
        done = hollow(*arguments)
        assert done.status == 1, what
        assert sentence in done.stderr, what
        assert "Traceback" not in done.stderr, what
        assert done.stdout == "", what
        assert sorted(tmp_path.rglob("*")) == before, what


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "plan", "cuts", "sample", "analyze"])
def test_a_model_of_another_noise_is_refused_by_every_command(
    hollow: Hollow, shallow_folder: Path, photos: Path, tmp_path: Path, verb: str
) -> None:
    model, lora, out = tmp_path / "model", tmp_path / "lora.safetensors", tmp_path / "out"
    shutil.copytree(shallow_folder, model)
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "EDMEulerScheduler"}))
    save_file({"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0)}, lora)
    done = hollow(
        *{
            "train": ["train", model, "--images", photos, "--subject", "dog", "--out", out],
            "plan": ["plan", model],
            "cuts": ["cuts", model],
            "sample": ["sample", model, "--lora", lora, "--prompt", "a dog", "--out", out],
            "analyze": ["analyze", lora, "--model", model],
        }[verb]
    )
    assert done.status == 1
    assert "has the scheduler EDMEulerScheduler, but Hollow trains U-Nets on DDPM's noise alone" in done.stderr
    assert done.stdout == ""
    assert not out.exists()


def test_train_takes_a_persons_word_for_a_prediction_that_a_model_calls_otherwise(
    hollow: Hollow, shallow_folder: Path, photos: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(shallow_folder, model)
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "velocity"}))
    train = ["train", model, "--images", photos, "--subject", "dog", "--out", tmp_path / "out", "--steps", 1]
    train += ["--samples", 2, "--resolution", 128, "--cut", 1, "--device", "cpu"]
    assert "is said to predict 'velocity', which Hollow does not know" in hollow(*train).stderr
    done = hollow(*train, "--prediction-type", "v_prediction")
    assert done.status == 0, done.stderr


def test_train_chooses_what_fits_and_goes_on_with_it(
    hollow: Hollow, shallow_folder: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train = ["train", shallow_folder, "--images", photos, "--subject", "dog", "--out", out, "--device", "cpu"]
    train += ["--samples", 2, "--rank", 64]
    done = hollow(*train, "--budget", "4GB", "--plan-only", "--json")
    assert done.status == 0, done.stderr
    assert "Chosen: the whole network in fp32. Given up: nothing." in done.stderr
    assert not out.exists()
    little = f"{json.loads(done.stdout)['bytes'] / 2**20 - 0.1:.2f}MB"

    done = hollow(*train, "--budget", little, "--steps", 1)
    assert done.status == 0, done.stderr
    assert "Chosen: the whole network in bf16. Given up: fp32 for bf16." in done.stderr
    assert "GiB at most, in its stage train; 0.02 GiB are the budget." in done.stderr
    kept = (out / "run.toml").read_text()
    assert kept.startswith("# Chosen: the whole network in bf16.")
    assert 'precision = "bf16"\n' in kept

    done = hollow(*train, "--budget", "4GB", "--steps", 2)
    assert done.status == 0, done.stderr
    assert "It goes on with the whole network in bf16." in done.stderr
    again = (out / "run.toml").read_text()
    assert again == kept.replace("steps = 1\n", "steps = 2\n").replace(little, "4GB")

    done = hollow(*train, "--budget", "1MB", "--precision", "fp32", "--cut", 2, "--out", tmp_path / "other")
    assert done.status == 1
    assert "Nothing fits into 0.00 GiB: the smallest, cut 2 in fp32, gradient checkpointing, 8-bit" in done.stderr


@pytest.mark.slow
def test_a_run_is_repeated_from_the_file_beside_its_lora(
    hollow: Hollow, shallow_folder: Path, photos: Path, tmp_path: Path
) -> None:
    asked = tmp_path / "asked.toml"
    asked.write_text(
        f"model = '{shallow_folder}'\nimages = '{photos}'\nsubject = 'dog'\nout = '{tmp_path / 'first'}'\n"
        "device = 'cpu'\ncut = 2\nsamples = 2\nrank = 4\nsteps = 9\nmax-grad-norm = inf\nlayers = 'all'\n"
        "learning-rate = 1\n"
    )
    done = hollow("train", "--config", asked, "--steps", 2, "--alpha", 2)
    assert done.status == 0, done.stderr
    kept = tmp_path / "first" / "run.toml"
    assert "max-grad-norm = inf\n" in kept.read_text()
    done = hollow("train", "--config", kept, "--out", tmp_path / "second")
    assert done.status == 0, done.stderr
    changed = kept.read_text().replace(str(tmp_path / "first"), str(tmp_path / "second"))
    assert (tmp_path / "second" / "run.toml").read_text() == changed
    first, second = (load_file(tmp_path / name / "lora.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any("resnets_0_conv1" in key for key in first)
    assert {float(first[key]) for key in first if key.endswith(".alpha")} == {2.0}


@pytest.mark.slow
def test_tensorboard_has_every_step_once(
    hollow: Hollow, shallow_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a run that went on, too."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train = ["train", shallow_folder, "--images", photos, "--subject", "dog", "--out", tmp_path / "rex", "--cut", 2]
    train += ["--samples", 2, "--rank", 2, "--warmup", 2, "--device", "cpu", "--log-dir", tmp_path / "logs"]
    for steps in (3, 4):
        done = hollow(*train, "--steps", steps)
        assert done.status == 0, done.stderr
    events = accumulator.EventAccumulator(str(tmp_path / "logs" / "rex"))
    events.Reload()
    rates = [(event.step, event.value) for event in events.Scalars("learning rate")]
    assert rates == [(1, 0.0), (2, pytest.approx(5e-5)), (3, pytest.approx(1e-4)), (4, pytest.approx(1e-4))]
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3, 4]
    assert f"loss {losses[-1].value:.4f}" in done.stderr

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    done = hollow(*train)
    assert done.status == 1
    assert "--log-dir needs TensorBoard, which is not installed. Run `pip install tensorboard`" in done.stderr


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("rnak = 4", "has a key 'rnak', but there is no such option"),
        ("plan-only = true", "has a key 'plan-only', but"),
        ("rank = 'many'", "rank cannot be 'many'."),
        ("rank = [1, 2]", "rank cannot be [1, 2]."),
        ("rank = true", "rank cannot be True. It is not true or false."),
        ("stream = 'yes'", "stream cannot be 'yes'. Write true or false."),
        ("precision = 'fp8'", "precision cannot be 'fp8'."),
        ("zo-timesteps = [1]", "zo-timesteps cannot be [1]."),
        ("images = 4", "images cannot be 4."),
        ("rank 4", "is no valid TOML"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_what_is_wrong_with_a_settings_file_is_a_sentence(
    hollow: Hollow, tmp_path: Path, content: str | None, sentence: str
) -> None:
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_text(content)
    done = hollow("train", "--config", file)
    assert done.status == 1
    assert str(file) in done.stderr
    assert sentence in done.stderr


def test_every_option_has_a_help_and_those_of_train_are_in_groups() -> None:
    commands = [get_command(app)]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        for parameter in command.params:
            assert parameter.help, (command.name, parameter.name)
            if command.name == "train" and parameter.param_type_name == "option" and parameter.name != "as_json":
                assert parameter.rich_help_panel, parameter.name


def test_help_names_every_option_with_its_default() -> None:
    command = [sys.executable, "-c", "from hollow_core.cli import main; main()", "train", "--help"]
    environment = os.environ | {"COLUMNS": "400", "TERM": "dumb"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    options = [line.strip("│ ") for line in done.stdout.splitlines() if line.startswith("│") and "--" in line]
    assert len(options) > 15
    for option in options:
        name, *explained = option.strip("* ").split("  ")
        assert len(" ".join(explained).strip()) > 20, option
        assert "--help" in name or "--json" in name or "default" in option or "required" in option, option


@pytest.mark.slow
def test_another_setting_goes_beside_and_each_has_its_options(
    hollow: Hollow, shallow_folder: Path, photos: Path, tmp_path: Path
) -> None:
    out, logs = tmp_path / "out", tmp_path / "logs"
    train = ["train", shallow_folder, "--images", photos, "--subject", "dog", "--out", out, "--device", "cpu"]
    train += ["--samples", 2, "--steps", 2, "--log-dir", logs, "--json"]
    first = hollow(*train, "--rank", 2)
    assert first.status == 0, first.stderr
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    second = hollow(*train, "--rank", 4)
    assert second.status == 0, second.stderr
    file = Path(json.loads(second.stdout)["file"])
    assert file.parent.name.startswith("rank-4-")
    assert (
        f"{out} holds a training of other settings, pictures or captions, which stays. This one is in {file.parent}."
        in second.stderr
    )
    assert all(path.read_bytes() == content for path, content in before.items())
    assert "rank = 2\n" in (out / "run.toml").read_text()
    assert "rank = 4\n" in (file.parent / "run.toml").read_text()
    assert {path.parent for path in logs.rglob("events*")} == {logs / "out", logs / "out" / file.parent.name}

    names = lora_files([out / "lora.safetensors", out / "*" / "lora.safetensors"])  # a row each of a grid
    assert list(names.values()) == [out / "lora.safetensors", file]

    again = hollow("train", "--config", file.parent / "run.toml", "--json")  # whose out is the same
    assert again.status == 0, again.stderr
    assert json.loads(again.stdout)["file"] == str(file)
    assert hollow(*train, "--rank", 2).status == 0
    assert before.keys() | set(file.parent.iterdir()) == {path for path in out.rglob("*") if path.is_file()}


def test_a_folder_in_use_is_told_before_anything_is_loaded(
    hollow: Hollow, shallow_folder: Path, photos: Path, tmp_path: Path
) -> None:
    program = "import sys; from pathlib import Path; from hollow_core.lock import holding\n"
    program += "with holding(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        done = hollow("train", shallow_folder, "--images", photos, "--subject", "dog", "--out", tmp_path / "out")
    assert done.status == 1
    assert f"out is in use by process {holder.pid} on" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_what_ends_a_run_lets_it_save(shallow_folder: Path, photos: Path, tmp_path: Path, name: str) -> None:
    """As schedulers, containers and closed terminals do."""
    arguments = ["train", shallow_folder, "--images", photos, "--subject", "dog", "--out", tmp_path / "out"]
    arguments += ["--samples", 2, "--rank", 2, "--steps", 100_000, "--save-every", 20, "--device", "cpu"]
    heard = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # which nohup, and "&", would have ignored
    heard += "signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [sys.executable, "-c", heard + "from hollow_core.cli import main; main()", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list((tmp_path / "out").glob("lora-*.safetensors")):
            time.sleep(0.05)
        (tmp_path / "out" / "checkpoint.safetensors").unlink()
        process.send_signal(getattr(signal, name))
        try:
            _, told = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 130, told
    assert "Stopped. The same command goes on from here." in told
    steps = len(load_file(tmp_path / "out" / "checkpoint.safetensors")["losses"])
    assert 20 <= steps < 100_000
    assert (tmp_path / "out" / "lora.safetensors").exists()


def test_nohup_stays_so() -> None:
    """What is ignored outside is ignored inside, and all is as before behind."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--out", "PHOTOS"], "is a folder of your pictures"),
        (["--out", "PHOTOS/img/5_sks"], "is a folder of your pictures"),
        (["--show-crops", "PHOTOS/crops.png"], "is a folder of your pictures"),
        (["--class-folder", "PHOTOS"], "would be both of the subject and of the class"),
        (["--validation", "PHOTOS"], "would be both of the subject and held out"),
    ],
)
def test_a_folder_has_one_part_to_play(
    hollow: Hollow, model_folder: Path, photos: Path, tmp_path: Path, options: list[str], sentence: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    options = [option.replace("PHOTOS", str(photos)) for option in options]
    done = hollow("train", model_folder, "--images", photos, "--subject", "dog", "--out", tmp_path / "out", *options)
    assert (done.status, done.stdout) == (1, "")
    assert sentence in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
