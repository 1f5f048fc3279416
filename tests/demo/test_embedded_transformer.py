"""The embedded transformer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers.pipelines.z_image", reason="this version of diffusers has no Z-Image")
from diffusers import ZImagePipeline

from hollow_core.demo import gates, pretrain_transformer, run, world
from hollow_core.files import read_json

FOLDER = run.MODEL.parent / "transformer"


@pytest.fixture(scope="module")
def pipeline() -> ZImagePipeline:
    return pretrain_transformer.load(FOLDER)


def test_it_is_small_and_no_pickle() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} == {".safetensors", ".json", ".txt"}


def test_diffusers_loads_it_and_draws(pipeline: ZImagePipeline) -> None:
    assert len(pipeline.transformer.layers) >= 12
    drawn = gates.draw(pipeline, ["a photo of a cup on the grass", "a photo of a cat at night"], steps=2)
    assert [picture.size for picture in drawn] == [(world.SIZE, world.SIZE)] * 2
    assert drawn[0].tobytes() != drawn[1].tobytes()


def test_it_sees_the_words_of_a_prompt_and_nothing_around_them(pipeline: ZImagePipeline) -> None:
    short, long = pretrain_transformer.encode(pipeline, ["a cup", "a cup on the grass"])
    assert [len(short), len(long)] == [2 + 2, 5 + 2]
    torch.testing.assert_close(short[:3], long[:3])


def test_the_figures_beside_it_pass_the_gates_of_ends_and_scene() -> None:
    figures = read_json(FOLDER / "log.json")["gates"]
    assert figures["zeroed_residual_raises_loss_percent"] >= 5
    assert figures["foreign_residual_raises_loss_percent"] >= 5
    assert figures["base_scene_score"] >= 0.95
    assert figures["base_class_score"] >= 0.85  # of the U-Net .95 is asked: this one learned from far fewer pictures


@pytest.mark.slow
def test_its_ends_matter(pipeline: ZImagePipeline) -> None:
    """Else hollowing would be free, and the demo would prove nothing."""
    figures = gates.ends_matter(pipeline, pictures=64, levels=8)
    assert figures["zeroed_residual_raises_loss_percent"] >= 5
    assert figures["foreign_residual_raises_loss_percent"] >= 5


@pytest.mark.slow
def test_its_demo_goes_the_road_on_one_path(
    pipeline: ZImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a fraction of everything; diffusers reads the LoRA, with nothing left over, and it changes the picture."""
    monkeypatch.setattr(run, "SAMPLES", 16)
    monkeypatch.setattr(run, "CLASS_IMAGES", 2)
    demo = replace(run.DEMOS["transformer"], sampling=replace(run.SAMPLING, steps=2))
    report = run.run(tmp_path, settings=replace(demo.settings, steps=6, save_every=3), demo=demo)
    assert list(report["rows"]) == ["base model", "plain LoRA", "hollowed LoRA"]
    assert report["settings"]["cut"] == (0, 4)
    assert 30 < report["removed_percent"] < 50
    before = gates.draw(pipeline, ["a photo of a sks cup at night"], steps=2)
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    assert gates.draw(pipeline, ["a photo of a sks cup at night"], steps=2)[0].tobytes() != before[0].tobytes()
    pipeline.unload_lora_weights()
