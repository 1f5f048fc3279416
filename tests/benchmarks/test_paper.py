"""The benchmark of the paper's tables: its baselines against diffusers, and that tables say what was measured."""

import re
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_training import tiny_examples, tiny_schedule
from tiny_unets import make_tiny_conditioning, make_tiny_unet

from benchmarks.held_out import keep_alike
from benchmarks.paper import results
from benchmarks.paper.baselines import finetune, pruned
from benchmarks.paper.figures import Figure, Measured, short
from benchmarks.paper.predictions import TABLE_3, TABLE_6, Predicted
from benchmarks.paper.trial import Extent, Trial, base_prompts
from benchmarks.paper.ways import (
    CALMER,
    CUTS,
    FRESH,
    GIVING_UP,
    HOLLOWED,
    LEARNING,
    LORA,
    MAIN,
    PRUNED,
    SAMPLES,
    WAYS,
    Wording,
    learned,
)
from hollow_core.demo import run
from hollow_core.errors import HollowError
from hollow_core.files import write_json
from hollow_core.lora.layers import ATTENTION
from hollow_core.nets.unet import UNet
from hollow_core.nets.unet_layers import max_cut
from hollow_core.training.precompute import precompute
from hollow_core.training.settings import TrainSettings
from hollow_core.training.train import train


def test_a_pruned_unet_without_its_mid_block_is_diffusers_own() -> None:
    unet = make_tiny_unet("sd15")
    config = dict(unet.config) | {"mid_block_type": None}
    expected: UNet2DConditionModel = UNet2DConditionModel.from_config(config).eval()
    expected.load_state_dict({k: v for k, v in unet.state_dict().items() if not k.startswith("mid_block")})
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    prompt = make_tiny_conditioning(unet).encoder_hidden_states
    with torch.no_grad():
        drawn = pruned(unet, 0)(latents, 500, prompt).sample
        torch.testing.assert_close(drawn, expected(latents, 500, prompt).sample)
        assert not torch.allclose(drawn, unet(latents, 500, prompt).sample, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_every_cut_can_be_pruned_and_trained(layout: str, tmp_path: Path) -> None:
    for cut in range(max_cut(make_tiny_unet(layout).config)):  # the last leaves no layer on the way down
        unet, schedule = make_tiny_unet(layout), tiny_schedule()
        store = precompute(UNet(unet), schedule, tiny_examples(unet), tmp_path / f"{cut}", cut=None, samples=2)
        settings = TrainSettings(rank=2, steps=1, targets=("conv1",))
        result = train(UNet(pruned(unet, cut)), schedule, store, settings, folder=tmp_path / f"training {cut}")
        assert all(tensor.isfinite().all() for tensor in result.state.values())


@pytest.mark.slow
def test_full_finetuning_trains_all_weights_and_its_loss_falls(tmp_path: Path) -> None:
    unet, schedule = make_tiny_unet("sd15"), tiny_schedule()
    before = {name: tensor.clone() for name, tensor in unet.named_parameters()}
    store = precompute(UNet(unet), schedule, tiny_examples(unet, priors=1), tmp_path, cut=None, samples=4)
    losses = finetune(unet, schedule, store, TrainSettings(steps=40, batch=1, learning_rate=5e-2))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    moved = [not torch.equal(tensor, before[name]) for name, tensor in unet.named_parameters()]
    assert sum(moved) > 0.95 * len(moved)
    assert not any(parameter.requires_grad for parameter in unet.parameters())


PREDICTED: Predicted = {
    "gib": {way.name: 3.25 for way in WAYS if way.cut is None or way.cut < 7},
    "recomputed": {LORA.name: 2.0, HOLLOWED.name: 1.5},
    "inference": 3.5,
    "operations": dict.fromkeys(TABLE_3, 10**12),
    "fp32_storage": [[cut, samples, 10**9] for cut, samples in TABLE_6],
    "removed": {name: [8.0 * cut for cut in CUTS] for name in ("sd21", "embedded")},
}


def row(subject: float) -> dict[str, float]:
    return {"subject": subject, "scene": 1.0, "structure": 0.5, "colour": subject / 2, "shape": 1 - subject}


def test_results_tell_means_spreads_and_paired_differences(tmp_path: Path) -> None:
    for (subject, seed), (lora, two, one) in {(0, 0): (0.8, 0.7, 0.71), (1, 0): (0.6, 0.48, 0.5)}.items():
        write_json(Trial(tmp_path, LORA, subject, seed).result, {"one path": row(lora)})
        rows = {"two paths": row(two), "one path": row(one)}
        write_json(Trial(tmp_path, HOLLOWED, subject, seed).result, rows)
        write_json(Trial(tmp_path, PRUNED[1], subject, seed).result, {"one path": row(two - 0.3)})
        write_json(tmp_path / "base" / f"subject-{subject}.json", row(0.02))
    write_json(tmp_path / "strayed" / f"{PRUNED[1].name}.json", 0.006)
    for way, subject_score in zip(CALMER.values(), (0.75, 0.65), strict=True):
        write_json(Trial(tmp_path, way, 0, 0).result, {use: row(subject_score) for use in ("one path", "two paths")})
    for subject, lora in enumerate((0.8, 0.6)):
        write_json(Trial(tmp_path, FRESH, subject, 0).result, {"one path": row(lora)})
    for way in (CUTS[0], CUTS[6], SAMPLES[50], SAMPLES[1000]):
        write_json(Trial(tmp_path, way, 0, 0).result, {"two paths": row(0.5), "one path": row(0.4)})
    write_json(Trial(tmp_path, LORA, 2, 0).result, {"one path": row(0.1)})  # without a twin: in no difference
    keep_alike(tmp_path, {})
    measured = Measured.read(tmp_path, WAYS, range(3), range(1))
    text = results.write(tmp_path, measured, Extent(), PREDICTED).read_text()
    assert (
        "| the same at rank 16 | +.008 | -.110 ± .010 | +.000 ± .000 | 2 | cannot be told |" in text
    )  # t of two subjects is 12.7
    assert (
        "| A pruned net, re-trained, is worse than hollowed | -.031 | -.300 ± .000 | +.000 ± .000 | 2 | yes |" in text
    )
    assert "Full fine-tuning is hardly better" not in text  # it is not measured
    assert "| the same, re-trained | .290 ± .110 | 1.000 ± .000 | .500 ± .000 | .006 |" in text
    assert "| Hollowed is as good as LoRA (rank 128) | +.002 | -.100 |" in text  # at the lower learning rate
    assert "| the same file on a single path | .605 ± .105 | 1.000 ± .000 |  | 3.25 |" in text
    assert text.count("| LoRA, rank 128 | .750 ± .000 |") == 2  # in Tables 1 and 5
    assert "| LoRA, rank 16 | .800 ± .000 |" in text  # of the one subject that all ranks have
    assert "1 training in each row, of 1 subject." in text
    assert "| k=6, 48.0 % | .500 ± .000 | 1.000 ± .000 | .500 ± .000 | -.300 | -.100 |" in text  # over LoRA, one path
    assert "| 400 | .700 ± .100 | 1.000 ± .000 | .500 ± .000 | +.000 ± .000 |" in text
    assert "| hollowed, rank 16 | .590 ± .110 | .605 ± .105 | +.015 ± .005 | 2 |" in text
    assert "| base model | .020 ± .000 |" in text
    assert re.findall(r"\((\w+\.png)\)", text) == ["cuts.png", "records.png"]
    assert all((tmp_path / picture).exists() for picture in ("cuts.png", "records.png"))
    assert len({way.name for way in WAYS}) == len(WAYS)
    assert list(CUTS) == list(range(9))  # the embedded U-Net has attention two levels deep


def test_the_main_comparisons_are_paired_with_plain_lora_and_between_judges(tmp_path: Path) -> None:
    """Two judges of three see the same: a colour that is half of the score, and a shape that is its opposite."""
    lora = {0: 0.8, 1: 0.6, 2: 0.75}
    for subject, way in product(lora, {*MAIN, *GIVING_UP}):
        less = 0.0 if way == LORA else 0.1 * (1 + len(way.name) % 3) + 0.01 * subject
        score = row(lora[subject] - less)
        uses = dict.fromkeys(("one path", "two paths", "two paths, refresh 3"), score)
        write_json(Trial(tmp_path, way, subject, 0).result, uses | {"took": {"seconds": 36.0}})
        write_json(tmp_path / "base" / f"subject-{subject}.json", row(0.02))
    keep_alike(tmp_path, {})
    measured = Measured.read(tmp_path, WAYS, range(3), range(1))
    predicted: Predicted = {**PREDICTED, "gib": {**PREDICTED["gib"], HOLLOWED.name: 2.5}}
    text = results.write(tmp_path, measured, Extent(), predicted).read_text()
    assert "3 trainings in each row, of 3 subjects." in text
    assert "| plain LoRA | .717 ± .085 | .358 ± .042 | .283 ± .085 |  |  |  | 1.000 ± .000 | 3.25 |" in text
    less = 0.1 * (1 + len(HOLLOWED.name) % 3) + 0.01
    found = re.search(
        r"\| hollowed at k=3 \| \S+ ± \S+ \| .*? \| .*? \| (\S+) ± \.006 \| (\S+) ± \.003 \| (\S+) ±", text
    )
    assert found is not None
    assert [float(number) for number in found.groups()] == pytest.approx([-less, -less / 2, less], abs=1e-3)
    judged = dict(re.findall(r"\| (colour|shape) \| (-?[\d.]+) \|", text))
    assert judged == {"colour": "1.000", "shape": "-1.000"}
    assert f"{len({*MAIN, *GIVING_UP}) * 3} trainings with their" in text.replace("\n", " ")
    assert f"{len({*MAIN, *GIVING_UP}) * 3 / 100:.1f} hours" in text
    assert "| hollowed, k=3, checkpointing | 1.50 | .46 |".replace(".46", "0.46") in text
    assert (tmp_path / "giving-up.png").exists()


def test_ways_learn_what_they_say() -> None:
    network = UNet(make_tiny_unet("sd15"))
    up, outside, changed = (
        learned(LEARNING[which], network, ATTENTION, ["1-1"])
        for which in ("up half", "outside the hollow", "most changed blocks")
    )
    assert up
    assert all(path.startswith("up_blocks.") for path in up)
    gone = tuple(f"{path}." for path in network.removed(run.CUT))
    everything = [
        path
        for path, module in network.module.named_modules()
        if isinstance(module, torch.nn.Linear) and path.endswith(ATTENTION)
    ]
    assert set(outside) == {path for path in everything if not path.startswith(gone)}
    assert 0 < len(outside) < len(everything)
    assert changed
    assert all(path.startswith("down_blocks.0.attentions.0.") for path in changed)
    assert learned(LORA, network, ATTENTION) == ATTENTION


def test_the_base_path_has_its_prompt_in_each_wording() -> None:
    said = {wording: base_prompts(wording, "a photo of a sks cup on the beach", "cup") for wording in get_args(Wording)}
    assert said == {
        "class word": ["a photo of a cup on the beach"],
        "coarser word": ["a photo of a thing on the beach"],
        "empty": [""],
        "personal": ["a photo of a sks cup on the beach"],
        "coarser word or personal": ["a photo of a thing on the beach", "a photo of a sks cup on the beach"],
    }


def test_seeds_of_one_subject_are_no_strangers() -> None:
    """Three subjects, the same with every seed: more seeds make the mean no surer."""
    values = {(subject, seed): score for subject, score in enumerate([0.1, 0.2, 0.3]) for seed in range(9)}
    figure = Figure.of(values)
    assert figure is not None
    assert figure[:2] == pytest.approx((0.2, (0.02 / 3) ** 0.5))
    assert figure.error == pytest.approx(0.1 / 3**0.5)
    assert figure.interval == pytest.approx((0.2 - 4.30 * figure.error, 0.2 + 4.30 * figure.error))
    assert (short(0.05), short(-0.05), short(10.5)) == (".050", "-.050", "10.500")


def test_a_folder_has_rows_made_alike(tmp_path: Path) -> None:
    keep_alike(tmp_path, {"steps": 60})
    keep_alike(tmp_path, {"steps": 60})
    with pytest.raises(HollowError, match=r"was begun with other settings \(steps\)\. Choose another folder\."):
        keep_alike(tmp_path, {"steps": 400})
