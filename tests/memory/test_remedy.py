"""What is said where memory is not enough, and that what it advises would do."""

import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from tiny_pipelines import tiny_pipeline
from tiny_unets import SMALL

from hollow_core.cli import main
from hollow_core.errors import HollowError
from hollow_core.memory import meter
from hollow_core.memory.planner import GIB, Planner
from hollow_core.memory.remedy import advice, check_fits, memory_told, needs
from hollow_core.memory.setting import Setting
from hollow_core.models.base_model import outline_unet
from hollow_core.models.layouts import layout_config
from hollow_core.training.settings import TrainSettings

CONFIG = layout_config("sd15") | {
    **SMALL["sd15"],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "sample_size": 32,
}
SETTING = Setting(cut=1, training=TrainSettings(rank=4))
BOTH = ("precompute", "train")


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(partial(outline_unet, CONFIG))


def with_checkpointing(setting: Setting) -> Setting:
    return replace(setting, training=replace(setting.training, gradient_checkpointing=True))


@pytest.mark.slow
def test_a_bare_unet_has_the_two_stages_that_run_it(planner: Planner) -> None:
    prediction = planner.predict(SETTING)
    assert tuple(prediction.stages) == BOTH
    assert prediction.bytes == needs(planner, BOTH, SETTING)
    assert planner.resolution == 8 * 32
    with torch.inference_mode():  # as a node of ComfyUI is
        assert Planner(partial(outline_unet, CONFIG)).predict(SETTING) == prediction
    whole = planner.fit(2 * prediction.bytes, SETTING, precisions=["fp32"], cuts=[1])
    assert whole.prediction.setting == SETTING


def test_what_fits_is_not_refused(planner: Planner) -> None:
    check_fits(planner, SETTING, needs(planner, BOTH, SETTING), BOTH)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lever", "changed"),
    [
        ("gradient checkpointing", with_checkpointing(SETTING)),
        ("gradient checkpointing and an 8-bit base", replace(with_checkpointing(SETTING), base_bits=8)),
        ("gradient checkpointing and streaming", replace(with_checkpointing(SETTING), streaming=True)),
    ],
)
def test_the_lever_that_costs_least_of_those_that_do_is_named(planner: Planner, lever: str, changed: Setting) -> None:
    enough = needs(planner, BOTH, changed)
    with pytest.raises(HollowError) as refusal:
        check_fits(planner, SETTING, enough, BOTH)
    needed, free, then = (float(number) for number in re.findall(r"([\d.]+) GiB", str(refusal.value)))
    assert str(refusal.value).startswith("The stage train needs")
    assert f" with cut 1 in fp32, but {free:.2f} GiB are free. Take {lever}: then it is " in str(refusal.value)
    assert needed == pytest.approx(planner.peak("train", SETTING).total / GIB, abs=0.01)
    assert then == pytest.approx(enough / GIB, abs=0.01)


@pytest.mark.slow
def test_records_at_once_are_the_first_to_go(planner: Planner) -> None:
    one, four = (replace(SETTING, training=replace(SETTING.training, batch=4, together=n)) for n in (1, 4))
    assert advice(planner, ["train"], four, needs(planner, ["train"], one)).startswith("Take together 1:")
    alone = replace(SETTING, training=replace(SETTING.training, together=4))  # at batch 1
    enough = needs(planner, ["train"], with_checkpointing(alone))
    assert advice(planner, ["train"], alone, enough).startswith("Take gradient checkpointing:")
    enough = needs(planner, ["precompute"], SETTING)
    assert advice(planner, ["precompute"], alone, enough).startswith("Take together 1:")


@pytest.mark.slow
def test_where_nothing_helps_the_smallest_is_named(planner: Planner) -> None:
    said = r"Even cut \d in fp32, gradient checkpointing, streaming needs 0.0\d GiB: close what else uses the memory"
    with pytest.raises(HollowError, match=said):
        check_fits(planner, SETTING, 1000, BOTH)
    small = replace(with_checkpointing(SETTING), streaming=True)
    assert advice(planner, ["train"], small, 1000, going_on=True).startswith("Close what else uses the memory")


def test_selective_training_needs_what_the_larger_of_its_parts_does(planner: Planner) -> None:
    """And AdamW's moments of both kinds of steps."""
    selective, forward = (
        replace(SETTING, training=replace(SETTING.training, strategy=strategy)) for strategy in ("selective", "zo")
    )
    parts = [planner.peak("train", part) for part in (replace(SETTING, resolution=128), forward)]
    moments = parts[0].bytes["optimizer"]
    assert parts[1].bytes["optimizer"] == moments > 0
    assert needs(planner, ["train"], selective) == max(part.total for part in parts) + moments


def test_small_pictures_count_with_their_own_size(planner: Planner) -> None:
    selective = replace(SETTING, training=replace(SETTING.training, strategy="selective"))
    half, larger = (replace(selective, low_resolution=side) for side in (128, 192))
    assert needs(planner, ["train"], half) == needs(planner, ["train"], selective)
    assert needs(planner, ["train"], larger) > needs(planner, ["train"], selective)


def test_zeroth_order_steps_of_some_time_steps_need_what_others_do(planner: Planner) -> None:
    forward = replace(SETTING, training=replace(SETTING.training, strategy="zo"))
    some = replace(SETTING, training=replace(forward.training, zo_timesteps=(500, 900)))
    assert needs(planner, ["train"], some) == needs(planner, ["train"], forward)


def test_a_run_that_goes_on_keeps_its_records(planner: Planner) -> None:
    """What is advised does not change base or cut, of which they are made."""
    free = needs(planner, BOTH, with_checkpointing(replace(SETTING, base_bits=8)))
    for going_on, advised in ((False, "an 8-bit base"), (True, "streaming")):
        with pytest.raises(HollowError, match=f"Take gradient checkpointing and {advised}: then"):
            check_fits(planner, SETTING, free, BOTH, going_on=going_on)


def test_running_out_all_the_same_is_told_and_keeps_the_records(planner: Planner) -> None:
    """What is advised leaves cut and base as they are, whatever the memory."""
    for free in (GIB, 1000):
        with (
            pytest.raises(
                HollowError, match=r"Memory ran out in the stage train: .* saved stays, and the same run"
            ) as told,
            memory_told(lambda: planner, "train", SETTING, lambda free=free: free),
        ):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        assert "8-bit" not in str(told.value)
        assert not re.search(r"cut [^1]", str(told.value))
    with pytest.raises(ZeroDivisionError), memory_told(lambda: planner, "train", SETTING, lambda: 0):
        raise ZeroDivisionError


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "said"),
    [
        (
            (7, 5),
            ["Chosen: the whole network in fp16. Given up: fp32 for fp16.", "in its stage train; 0.04 GiB are free."],
        ),
        ((8, 0), ["Chosen: the whole network in bf16. Given up: nothing.", "0.04 GiB are free."]),
    ],
)
def test_train_on_a_gpu_takes_what_fits(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    said: list[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert train_on_a_gpu(tmp_path, monkeypatch, "--plan-only") == 0
    told = capsys.readouterr().err
    for sentence in said:
        assert sentence in told


@pytest.mark.slow
def test_train_on_a_gpu_refuses_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked for whole."""
    named = "--cut 1 --precision fp32 --together 1 --no-checkpointing --base-bits off --no-tiled-vae --no-stream"
    assert train_on_a_gpu(tmp_path, monkeypatch, *named.split(), "--no-stream-middle") == 1
    said = "The stage train needs 0.05 GiB with cut 1 in fp32, but 0.04 GiB are free. Take gradient checkpointing: then"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def train_on_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> object:
    """The status of the command. The GPU is never touched, so that none is needed here; what it has free is told to be
    little."""
    pipeline = tiny_pipeline("sd15")
    pipeline.register_modules(unet=UNet2DConditionModel.from_config(CONFIG))
    pipeline.save_pretrained(folder / "model")
    Image.new("RGB", (256, 256)).save(folder / "photo.png")
    monkeypatch.setattr(meter, "free_bytes", lambda _: 45 * 2**20)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    command = [
        "hollow",
        "train",
        str(folder / "model"),
        "--images",
        str(folder),
        "--subject",
        "dog",
        "--device",
        "cuda",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(folder / "out"), *options])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0


def test_cuts_worth_a_look_are_the_papers() -> None:
    assert Planner("sd21").cuts() == [0, 1, 2, 3, 4, 5, 6]
    assert Planner("sdxl").cuts() == [0, 1, 2]
