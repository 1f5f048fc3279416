"""Pictures are the diffusers pipeline's, although the parts of the model are used one after the other."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipelines import tiny_pipeline

from hollow_core.hollow import hollow
from hollow_core.lora import add_lora, lora_state, remove_lora
from hollow_core.lora_file import LoraFile, Recipe
from hollow_core.models import load
from hollow_core.sample import SampleSettings, sample


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_a_picture_is_the_pipelines(layout: str, tmp_path: Path) -> None:
    tiny_pipeline(layout).save_pretrained(tmp_path)
    model = load(tmp_path)
    pipeline = model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        ["a dog", "a cat"],
        height=64,
        width=96,
        negative_prompt=["blurred", "blurred"],
        num_inference_steps=2,
        guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
    ).images
    settings = SampleSettings(steps=2, guidance=5.0, negative="blurred", size=(64, 96))
    for together in (1, 2):
        drawn = sample(model, ["a dog", "a cat"], [3, 4], replace(settings, together=together), device="cpu")
        for one, other in zip(drawn, expected, strict=True):  # a batch of two rounds otherwise
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_pictures_drawn_together_on_two_paths_are_those_drawn_alone(tmp_path: Path) -> None:
    tiny_pipeline("sdxl").save_pretrained(tmp_path)
    model = load(tmp_path)
    hollowed = hollow(model.unet, 1)
    add_lora(hollowed, 4, generator=torch.Generator().manual_seed(0))
    state = {key: torch.ones_like(matrix) for key, matrix in lora_state(hollowed).items()}
    remove_lora(hollowed)
    lora = LoraFile(state, 1.0, Recipe(1, "sks", "dog", "a sks dog", "a dog", "epsilon"), {})
    prompts = ["a sks dog", "a sks cat in the city", "a sks dog"]
    settings, told = SampleSettings(steps=2, size=(64, 64)), []
    alone = sample(model, prompts, [3, 4, 5], settings, lora=lora)
    drawn = sample(
        model, prompts, [3, 4, 5], replace(settings, together=2), lora=lora, progress=lambda *done: told.append(done)
    )
    assert told == [(2, 3), (3, 3)]
    for one, other in zip(drawn, alone, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    one_path = sample(model, prompts, [3, 4, 5], replace(settings, together=2), lora=lora, single_path=True)
    assert np.abs(np.asarray(one_path[1], int) - np.asarray(drawn[1], int)).max() > 1
