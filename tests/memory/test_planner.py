"""Predicted memory against the paper's figures and against what a cut takes away; what a budget picks."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_pipelines import original_checkpoint, shallow_pipeline, tiny_pipeline, write_holes
from torch import nn

from benchmarks.memory import INFERENCE, PUBLISHED, REACH, inference, reach, training
from benchmarks.memory import SMALL as HALF
from hollow_core.cli import main
from hollow_core.cli.levers import LEVERS
from hollow_core.errors import HollowError
from hollow_core.memory.choice import choose, precisions_for
from hollow_core.memory.dry_run import DryRun
from hollow_core.memory.planner import GIB, STAGES, Planner, Prediction, parse_bytes
from hollow_core.memory.remedy import advice
from hollow_core.memory.setting import Setting
from hollow_core.models.base_model import load, outline
from hollow_core.nets.network import removed_fraction
from hollow_core.nets.residency import stream
from hollow_core.nets.unet import UNet, head
from hollow_core.nets.unet_layers import exit_shape
from hollow_core.training.settings import TrainSettings

pytestmark = pytest.mark.slow

SMALL = Setting(cut=2, training=TrainSettings(rank=128))
CUTS = (None, 2)


@pytest.fixture(scope="module")
def sd21() -> Planner:
    return Planner("sd21")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    shallow_pipeline("sd15").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Planner:
    return Planner(str(folder))


@pytest.fixture(scope="module")
def table(tiny: Planner) -> dict[int | None, Prediction]:
    return {cut: tiny.predict(replace(SMALL, cut=cut)) for cut in CUTS}


def test_latents_that_records_were_made_of_stay_when_a_run_goes_on(sd21: Planner) -> None:
    large = replace(SMALL, resolution=1024)
    free = sd21.peak("encode", replace(large, tiled_vae=True)).total
    assert "Take a tiled VAE: then" in advice(sd21, ["encode"], large, free)
    assert "tiled" not in advice(sd21, ["encode"], large, free, going_on=True)


@pytest.mark.parametrize("row", [name for name in PUBLISHED if "rank 128" in name])
def test_training_takes_what_the_paper_measured(sd21: Planner, row: str) -> None:
    cut, rank, published = PUBLISHED[row]
    assert training(sd21, cut, rank) == pytest.approx(published, rel=0.05)


def test_inference_takes_what_the_paper_measured() -> None:
    assert inference() == pytest.approx(INFERENCE, rel=0.05)


def test_what_bytes_are_for(sd21: Planner) -> None:
    peak = sd21.peak("train", Setting(3, training=TrainSettings(rank=128)))
    lora = 4 * 24.00e6  # published: 24 M parameters at rank 128
    assert peak.bytes["lora"] == pytest.approx(lora, rel=0.002)
    assert peak.bytes["optimizer"] == pytest.approx(2 * lora, rel=0.002)
    kept = 4 * 865.91e6 * (1 - 0.3915)  # published: 866 M parameters, 39.2 % removed
    time_table = 4 * 200 * 1280
    assert peak.bytes["weights"] == pytest.approx(kept + time_table, rel=0.001)


REACHED = {
    "SD2.1 k=3, rank 128, fp32": 3.77,
    "rank 16, bf16, checkpointing": 1.21,
    "rank 128, bf16, checkpointing, 8-bit base, 8-bit AdamW": 0.86,
    "rank 16, bf16, checkpointing, 8-bit base": 0.73,
    "rank 16, bf16, checkpointing, streamed": 0.22,
    "the same, whole road": 0.55,
}
"""GiB, rounded up a little."""


def test_every_number_of_sd21_is_guarded() -> None:
    assert set(REACHED) == {row for row, (model, *_) in REACH.items() if model == "sd21"}


@pytest.mark.parametrize("row", REACHED)
def test_reach_of_sd21(sd21: Planner, row: str) -> None:
    assert 0.9 * REACHED[row] < reach(sd21, row) <= REACHED[row]


def test_reach_of_sdxl() -> None:
    """In its fullest stage, also of the whole road."""
    sdxl = Planner("sdxl")
    for row, most in {
        "SDXL k=1, rank 16, bf16, checkpointing": 3.2,
        "SDXL, streamed, tiled VAE, whole road": 0.6,
    }.items():
        assert sdxl.peak("train", REACH[row][1]).total <= most * GIB


@pytest.mark.parametrize("cut", [0, 3, 6])
def test_precomputing_takes_no_more_than_training_where_the_middle_visits(sd21: Planner, cut: int) -> None:
    setting = Setting(cut, stream_middle=True, training=HALF)
    assert sd21.peak("precompute", setting).total < sd21.peak("train", setting).total


def test_pictures_of_the_class_take_the_whole_unet(sd21: Planner) -> None:
    setting = Setting(3, training=HALF)
    of_class = sd21.peak("encode", replace(setting, class_images=5))
    assert of_class.bytes["weights"] == pytest.approx(2 * 865.91e6, rel=0.001)  # published, in bf16
    assert sd21.peak("encode", setting).total < of_class.total < sd21.peak("sample", setting).total


def test_half_precision_and_checkpointing(sd21: Planner) -> None:
    fp32 = sd21.peak("train", Setting(3, training=TrainSettings(rank=128)))
    half = sd21.peak("train", REACH["rank 16, bf16, checkpointing"][1])
    assert 2 * half.bytes["weights"] == pytest.approx(fp32.bytes["weights"], rel=0.001)
    assert 8 * half.bytes["lora"] == pytest.approx(fp32.bytes["lora"], rel=0.001)  # fp32, both


def test_each_level_that_recomputes_takes_less_memory_and_more_operations(sd21: Planner) -> None:
    """So that a budget may stop at the first that fits."""
    settings = [Setting(3, training=replace(HALF, gradient_checkpointing=False))]
    settings += [Setting(3, training=replace(HALF, checkpoint_levels=levels)) for levels in (1, 2, None)]
    peaks = [sd21.peak("train", setting).total for setting in settings]
    flops = [sd21.step_flops(setting) for setting in settings]
    assert peaks == sorted(peaks, reverse=True)
    assert flops == sorted(set(flops))
    fit = sd21.fit(peaks[1], settings[0], precisions=["bf16"], cuts=[3])
    assert fit.prediction.setting.training.checkpoint_levels == 1
    assert "gradient checkpointing of 1 level)" in fit.gave_up[-1]


def test_a_base_in_8_bits_takes_its_bits(sd21: Planner) -> None:
    half = sd21.peak("train", REACH["rank 16, bf16, checkpointing"][1])
    small = sd21.peak("train", REACH["rank 16, bf16, checkpointing, 8-bit base"][1])
    assert small.bytes["weights"] / half.bytes["weights"] == pytest.approx(8.25 / 16, rel=0.005)  # but for what is kept


def test_a_dora_takes_its_magnitudes_and_one_more_result_of_each_layer(sd21: Planner) -> None:
    settings = [Setting(3, training=TrainSettings(dora=dora)) for dora in (False, True)]
    plain, dora = (sd21.peak("train", setting).bytes for setting in settings)
    assert plain["lora"] < dora["lora"] < 1.1 * plain["lora"]
    assert plain["activations"] < dora["activations"] < 1.5 * plain["activations"]
    assert "DoRA" in str(settings[1])


def test_optimizer_states_in_8_bits(sd21: Planner) -> None:
    """Two bytes an element, and two scales of 4 bytes for each 256: published for bitsandbytes' block size."""
    peak = sd21.peak("train", REACH["rank 128, bf16, checkpointing, 8-bit base, 8-bit AdamW"][1])
    assert peak.bytes["optimizer"] == pytest.approx((2 + 2 * 4 / 256) * 24.00e6, rel=0.01)


def test_streamed_weights_are_elsewhere_but_for_those_that_visit() -> None:
    """A chain of alike layers, computed twice: two weights at most are ever there."""
    unet: Any = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8)))
    unet.to("meta").requires_grad_(False)
    stream(unet, "meta")
    with DryRun() as run:
        for _ in range(2):
            unet(torch.empty(1, 1024, device="meta", requires_grad=True)).sum().backward()
    weight, others = 4 * 1024 * 1024, 64 * 1024
    assert 2 * weight <= run.peak().total - run.peak().bytes["workspace"] <= 2 * weight + others


def test_each_cut_removes_its_share_of_the_weights(
    tiny: Planner, table: dict[int | None, Prediction], folder: Path
) -> None:
    unet = load(folder).unet
    whole = sum(parameter.nbytes for parameter in unet.parameters())
    slack = 512 * len(list(unet.parameters()))  # to which an allocator rounds up
    for cut in CUTS[1:]:
        times = 4 * SMALL.samples * unet.time_embedding.linear_2.out_features
        expected = whole * (1 - removed_fraction(UNet(unet), cut)) + times
        assert expected <= table[cut].stages["train"].bytes["weights"] <= expected + slack
        to_exit = sum(parameter.nbytes for parameter in head(unet, cut).parameters())
        assert to_exit <= table[cut].stages["precompute"].bytes["weights"] <= to_exit + slack
    assert table[None].stages["precompute"].total == 0  # nothing to do
    assert whole <= table[None].stages["train"].bytes["weights"] <= whole + slack


def test_a_prediction_tells_of_every_stage_and_of_the_disk(folder: Path, table: dict[int | None, Prediction]) -> None:
    for cut, prediction in table.items():
        row = json.loads(json.dumps(prediction.row()))
        assert tuple(row["stages"]) == STAGES
        for peak in row["stages"].values():
            assert peak["total"] == sum(size for kind, size in peak.items() if kind != "total")
        assert row["cut"] == cut
    assert table[None].store_bytes == 0
    shape = exit_shape(load(folder).unet.config, 2, 16, 16)
    assert table[2].store_bytes == 200 * 2 * math.prod(shape)  # fp16


def test_the_papers_storage(sd21: Planner) -> None:
    setting = Setting(3, samples=1000, store_dtype=torch.float32)
    assert sd21.store_bytes(setting) == pytest.approx(1.31e9, rel=0.01)


def test_operations_are_those_counted_before_and_what_is_recomputed(sd21: Planner) -> None:
    flops = sd21.step_flops(Setting(3, training=TrainSettings(rank=128)))
    assert 1 <= flops / 1.725e12 < 1.05  # attention's backward computes its scores again


def test_memory_that_is_gone_is_not_counted() -> None:
    with DryRun() as run:
        for _ in range(3):
            kept = torch.empty(1000, device="meta") + 1  # two at once
        assert kept.is_meta
    assert run.peak().total == 3 * 4096  # the last one lives until the next is made
    assert run.flops == 0


def test_an_optimizers_states_count_from_the_start() -> None:
    weight = torch.nn.Parameter(torch.empty(1024, 1024, device="meta"))
    with DryRun() as run:
        optimizer = torch.optim.AdamW([weight], foreach=True)
        (weight * 2).sum().backward()
        optimizer.step()
    assert run.peak().bytes["optimizer"] >= 2 * weight.nbytes
    assert run.peak().bytes["lora"] == weight.nbytes


def test_a_budget_takes_the_least_hollowing_that_fits(tiny: Planner) -> None:
    """The LoRA is large here, so that what is hollowed counts however small the base is; streaming comes last."""
    setting = replace(SMALL, base_bits=8, training=replace(SMALL.training, rank=512))

    def needed(cut: int | None) -> int:
        least = replace(setting, cut=cut, training=replace(setting.training, gradient_checkpointing=True))
        return max(tiny.peak(stage, least).total for stage in ("encode", "precompute", "train"))

    fit = tiny.fit(needed(1), setting, precisions=["fp32"])
    assert fit.prediction.bytes <= needed(1)
    assert (fit.prediction.setting.cut, fit.prediction.setting.streaming) == (1, False)
    assert min(needed(None), needed(0)) > needed(1)
    assert fit.gave_up[0] == "the middle of the network (cut 1)"


def test_a_budget_takes_the_fastest_way_that_fits(tiny: Planner, table: dict[int | None, Prediction]) -> None:
    everything = tiny.fit(2 * table[None].bytes, SMALL)
    assert everything.prediction.setting == replace(SMALL, cut=None)
    assert everything.gave_up == ()
    half = tiny.fit(table[None].bytes - 1, SMALL)
    assert half.prediction.setting.training.precision == "bf16"
    assert half.gave_up[0] == "fp32 for bf16"


def test_records_that_pass_together_need_more_and_are_given_up_first(tiny: Planner) -> None:
    def setting(batch: int, together: int, class_images: int = 0) -> Setting:
        training = replace(SMALL.training, batch=batch, together=together)
        return replace(SMALL, class_images=class_images, training=training)

    peaks = {pair: tiny.peak("train", setting(*pair)).bytes for pair in [(4, 1), (4, 2), (4, 4), (4, 64)]}
    activations = [peak["activations"] for peak in peaks.values()]
    assert activations[0] * 1.5 < activations[1]
    assert activations[1] * 1.5 < activations[2] == activations[3]  # there are no more than four
    assert tiny.peak("train", setting(2, 4, class_images=2)).bytes == peaks[4, 4]  # two are of the class
    fit = tiny.fit(tiny.predict(setting(4, 4)).bytes - 1, setting(4, 4), precisions=["fp32"], cuts=[2])
    assert fit.prediction.setting.training.together == 1
    assert not fit.prediction.setting.training.gradient_checkpointing
    assert fit.gave_up[-1] == "the speed of 4 records at once"
    flops = {pair: tiny.step_flops(setting(*pair)) for pair in [(4, 1), (4, 4), (2, 1, 2), (2, 4, 2)]}
    assert len(set(flops.values())) == 1
    of_stage = {
        stage: [tiny.peak(stage, setting(1, n, class_images=4)).bytes["activations"] for n in (1, 4, 8, 64)]
        for stage in ("encode", "precompute")
    }
    one, four, eight, more = of_stage["precompute"]
    assert one * 2 < four < eight == more  # a shard has eight
    one, four, eight, more = of_stage["encode"]
    assert one <= four == eight == more  # there are four pictures of the class
    fused = replace(SMALL.training, fused_backward=True, max_grad_norm=math.inf, together=2)
    with pytest.raises(HollowError, match=r"but there are pictures of the class too\. Set prior_weight to 0"):
        tiny.predict(replace(SMALL, class_images=2, training=fused))


def test_what_is_named_is_not_chosen(tiny: Planner) -> None:
    """Named levers stay, the others give way; what is not named begins with the fastest."""
    four = replace(SMALL, training=replace(SMALL.training, batch=4))
    free = choose(tiny, GIB, four, named=(), precisions=["bf16"]).prediction.setting
    assert (free.cut, free.training.precision, free.training.together) == (None, "bf16", 4)
    room = tiny.predict(replace(SMALL, cut=None)).bytes - 1
    named = {"cut", "precision", "gradient_checkpointing"}
    asked = replace(SMALL, cut=None)
    with pytest.raises(
        HollowError, match=r"Nothing fits into .*: the smallest, the whole network in fp32, 8-bit base, tiled"
    ):
        choose(
            tiny,
            1000,
            replace(asked, streaming=False),
            named={*named, "streaming", "stream_middle"},
            precisions=["bf16"],
        )
    chosen = choose(tiny, room, asked, named=named, precisions=["bf16"]).prediction.setting
    assert (chosen.cut, chosen.training.precision, chosen.training.gradient_checkpointing) == (None, "fp32", False)
    assert chosen.base_bits == 8
    with pytest.raises(HollowError, match="the smallest, the whole network in fp32, needs"):
        choose(tiny, room, asked, named=LEVERS.values(), precisions=["bf16"])
    assert precisions_for(torch.device("cpu"), asked) == ("fp32", "bf16")


def test_refusals_are_sentences(tiny: Planner, folder: Path) -> None:
    smallest = (
        "the smallest, .* in bf16, gradient checkpointing, 8-bit base, streaming, tiled VAE, needs .* GiB, in its stage"
    )
    with pytest.raises(HollowError, match=f"Nothing fits into 0.00 GiB: {smallest}"):
        tiny.fit(1000, SMALL, cuts=[2])
    with pytest.raises(HollowError, match=r"no cut 12\. Choose a cut from 0 to 3"):
        tiny.predict(Setting(12))
    with pytest.raises(HollowError, match="The resolution 100 is no multiple of 8 pixels"):
        tiny.predict(Setting(resolution=100))
    with pytest.raises(HollowError, match="0 records are too few"):
        tiny.predict(Setting(samples=0))
    with pytest.raises(HollowError, match=r"1 records are too few\. Ask for at least 2"):
        tiny.predict(Setting(samples=1, class_images=4))
    with pytest.raises(HollowError, match=r"'much' is no amount of memory\. Write it as 4GB"):
        parse_bytes("much")
    with pytest.raises(HollowError, match="sd99 does not exist"):
        Planner("sd99")


@pytest.mark.parametrize(("text", "size"), [("4GB", 4 * 2**30), ("3.5 GiB", 3.5 * 2**30), ("800m", 800 * 2**20)])
def test_amounts_of_memory(text: str, size: float) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("layout", ["sd15", "sd21", "sdxl"])
def test_an_outline_has_the_shapes_that_are_loaded(layout: str, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(layout)
    pipeline.save_pretrained(tmp_path)
    loaded, outlined = load(tmp_path), outline(str(tmp_path))
    assert (outlined.layout, outlined.resolution) == (loaded.layout, loaded.resolution)
    for real, fake in zip(
        (loaded.unet, loaded.vae, *loaded.text_encoders),
        (outlined.unet, outlined.vae, *outlined.text_encoders),
        strict=True,
    ):
        assert {name: tensor.shape for name, tensor in fake.state_dict().items()} == {
            name: tensor.shape for name, tensor in real.state_dict().items()
        }
        assert all(tensor.is_meta for tensor in fake.parameters())


def test_a_single_file_is_known_by_its_header(tmp_path: Path) -> None:
    """Of true size, but for what takes room."""
    path, public = tmp_path / "model.safetensors", outline("sd21", torch.float16)
    pipeline: Any = SimpleNamespace(unet=public.unet, vae=public.vae, text_encoder=public.text_encoders[0])
    write_holes(path, original_checkpoint(pipeline, "sd21"))
    found = outline(str(path), torch.float16)
    assert (found.layout, found.resolution) == ("sd21", public.resolution)
    assert found.unet.num_parameters() == public.unet.num_parameters()


def test_the_command_prints_json(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["hollow", "plan", str(folder), "--json", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code or 0, *capsys.readouterr())

    status, out, err = plan("--cut", "-1", "--base-bits", "8", "--optimizer", "adamw8bit")
    assert status == 0, err
    assert [(row["cut"], row["base_bits"], row["optimizer"]) for row in json.loads(out)] == [(None, 8, "adamw8bit")]
    status, out, err = plan("--budget", "4GB")
    assert status == 0, err
    assert json.loads(out)["gave_up"] == []
    assert "Given up: nothing." in err
    status, out, err = plan("--budget", "much")
    assert (status, out) == (1, "")
    assert "is no amount of memory" in err


def test_patches_are_what_training_and_precomputing_take(sd21: Planner) -> None:
    """As smaller pictures would; encoding and drawing are of whole ones. Of selective, BP-low alone is on patches."""
    setting = Setting(3, resolution=512, training=HALF)
    patches, small = replace(setting, patches=256), replace(setting, resolution=256)
    for stage in ("precompute", "train"):
        assert sd21.peak(stage, patches) == sd21.peak(stage, small)
        assert sd21.peak(stage, patches).total < sd21.peak(stage, setting).total
    for stage in ("encode", "sample"):
        assert sd21.peak(stage, patches) == sd21.peak(stage, setting)
    assert (sd21.store_bytes(patches), sd21.step_flops(patches)) == (sd21.store_bytes(small), sd21.step_flops(small))
    assert "patches of 256" in str(patches)
    both = replace(HALF, strategy="selective")
    selective = replace(setting, training=both)
    assert sd21.peak("train", replace(patches, training=both)) == sd21.peak("train", selective)
    assert sd21.store_bytes(replace(patches, training=both)) == sd21.store_bytes(selective)
    for side, said in {512: "not smaller than a picture of 512×512", 252: "no multiple of 8 pixels"}.items():
        with pytest.raises(HollowError, match=said):
            sd21.predict(replace(setting, patches=side))
