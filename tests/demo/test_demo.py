"""The embedded model and its demo."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageChops
from transformers import CLIPTokenizer

from hollow_core.demo import gates, language, run, scorers, world
from hollow_core.models.base_model import load
from hollow_core.nets.unet_layers import max_cut


def test_the_model_is_small_and_loads_as_any_other() -> None:
    files = [path for path in run.MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {path.suffix for path in files} == {".safetensors", ".json", ".txt"}
    pipeline = StableDiffusionPipeline.from_pretrained(run.MODEL, torch_dtype=torch.float32, local_files_only=True)
    assert max_cut(pipeline.unet.config) == 11
    assert pipeline.unet.config.layers_per_block == 2
    assert sum(kind.startswith("CrossAttn") for kind in pipeline.unet.config.down_block_types) == 3
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("a photo of a cup on the grass", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert drawn.images[0].size == (64, 64)


def test_held_out_subjects_are_never_drawn_in_training() -> None:
    choose = random.Random(0)
    drawn = {(s.kind, s.color, s.second) for s in (world.random_subject(choose) for _ in range(20_000))}
    assert len(set(world.HELD_OUT)) == 30
    assert {subject.kind for subject in world.HELD_OUT} == set(world.CLASSES)
    assert not drawn & {(s.kind, s.color, s.second) for s in (*world.HELD_OUT, *world.CHOSEN_ON)}
    assert not set(world.HELD_OUT) & set(world.CHOSEN_ON)
    assert {kind for kind, _, _ in drawn} == set(world.CLASSES)


def test_every_word_of_the_world_is_one_token() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(run.MODEL / "tokenizer")
    for word in language.vocabulary():
        assert len(tokenizer.tokenize(word)) == 1, word
    longest = max((world.photo_caption(f"sks {s.describe()}", "sea") for s in world.HELD_OUT), key=len)
    assert len(tokenizer(longest).input_ids) <= language.MAX_TOKENS


def test_references_are_the_same_individual_on_five_backgrounds() -> None:
    for subject in world.HELD_OUT:
        scenes = [scene for scene, _ in world.reference_pictures(subject)]
        again = [picture for _, picture in world.reference_pictures(subject)]
        assert len(set(scenes)) == 5
        assert not set(scenes) & set(world.NEW_SCENES)
        for (_, picture), twin in zip(world.reference_pictures(subject), again, strict=True):
            assert not ImageChops.difference(picture, twin).getbbox()


@pytest.mark.parametrize("shape", [(96, 64), (64, 112)])
def test_in_a_picture_that_is_no_square_the_subject_stands_near_an_end(shape: tuple[int, int]) -> None:
    for number, subject in enumerate(world.HELD_OUT):
        drawn, other = (
            np.asarray(world.draw(each, "night", random.Random(number), shape), dtype=int)
            for each in (subject, replace(subject, color="white", second="brown", accent="black"))
        )
        along = np.flatnonzero((drawn != other).any((0, 2) if shape[0] > shape[1] else (1, 2)))
        margin = (max(shape) - min(shape)) // 2
        assert along.min() < margin or along.max() >= max(shape) - margin
        assert along.max() - along.min() < min(shape)


def test_scorers_know_an_individual_from_another_of_its_class() -> None:
    figures = scorers.check(scorers.load())
    assert figures["same_subject_least"] > 0.7
    assert figures["same_class"] < 0.35
    assert figures["scene"] > 0.95
    assert figures["class"] > 0.9


@pytest.mark.slow
def test_the_middle_of_the_model_matters() -> None:
    """Else hollowing would be free, and the demo would prove nothing."""
    figures = gates.middle_matters(load(run.MODEL), pictures=128, batch=32)
    assert figures["zeroed_exit_raises_loss_percent"] >= 5
    assert figures["foreign_exit_raises_loss_percent"] >= 5


@pytest.mark.slow
def test_the_model_knows_half_size_pictures_and_other_shapes(tmp_path: Path) -> None:
    """As Stable Diffusion does, which saw 256 pixels before 512."""
    base = load(run.MODEL)
    assert gates.sizes_known(base, pictures=128, batch=32)["half_over_full_loss"] <= 1.3
    figures = gates.shapes_obey(base, scorers.load(), tmp_path, every=7)
    assert min(figures[f"{shape}_scene_score"] for shape in ("half", "wide", "tall")) > 0.85
    assert figures["half_class_score"] > 0.5  # of twelve


@pytest.mark.slow
def test_the_demo_leaves_all_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fraction of everything: what is learned is measured by benchmarks, that it works is seen here."""
    monkeypatch.setattr(run, "SAMPLES", 30)
    monkeypatch.setattr(run, "CLASS_IMAGES", 3)
    steps = []
    settings = replace(run.SETTINGS, steps=12, save_every=6)
    report = run.run(tmp_path, settings=settings, progress=lambda stage, done: steps.append((stage, done.step)))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert ("hollowed LoRA: train", 12) in steps
    assert report["records"] == 30
    assert report["stored_bytes"] > 0
    assert set(report["rows"]) == {
        "base model",
        "plain LoRA",
        "hollowed LoRA, two paths",
        "hollowed LoRA, single path",
    }
    assert {stage["name"] for stage in report["hollowed_stages"]} == {"encode", "precompute", "train", "sample"}
    assert all(stage["peak_bytes"] > 2**20 for stage in report["hollowed_stages"])
    for name in ("grid.png", "loss.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300
    pipeline = StableDiffusionPipeline.from_pretrained(run.MODEL, torch_dtype=torch.float32, local_files_only=True)
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))  # raises where a key is left over


@pytest.mark.parametrize("scene", world.SCENES)
def test_the_reader_reads_its_scene(scene: str) -> None:
    choose = random.Random(scene)
    drawn = [world.draw(world.random_subject(choose), scene, choose) for _ in range(8)]
    assert scorers.load().prompt_score(drawn, [scene] * 8) > 0.9
