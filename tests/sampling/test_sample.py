"""Pictures are the diffusers pipeline's, although the parts of the model are used one after the other."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipelines import tiny_pipeline

from hollow_core.demo import run
from hollow_core.errors import HollowError
from hollow_core.lora.file import LoraFile
from hollow_core.lora.layers import add_lora, lora_parameters, lora_state, remove_lora
from hollow_core.lora.metadata import Recipe
from hollow_core.models.base_model import load
from hollow_core.nets.unet import hollow
from hollow_core.sampling import sample as sampling
from hollow_core.sampling.prior import class_latents
from hollow_core.sampling.sample import SampleSettings, encode, portions, sample
from hollow_core.seeds import counted_up


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


@pytest.mark.slow
def test_pictures_drawn_together_on_two_paths_are_those_drawn_alone() -> None:
    """By the embedded model, where prompts matter."""
    model = run.model()
    hollowed = hollow(model.unet, 3)
    add_lora(hollowed, 2, generator=torch.Generator().manual_seed(0))
    state = {key: torch.full_like(matrix, 0.02) for key, matrix in lora_state(hollowed).items()}
    remove_lora(hollowed)
    lora = LoraFile(state, 2.0, Recipe(3, "sks", "cup", "a sks cup", "a cup", "v_prediction"), {})
    prompts = ["a photo of a sks cup at night", "a photo of a sks fish on the beach", "a photo of a sks cup at night"]
    alone = SampleSettings(steps=4, guidance=3.0)
    together, told = replace(alone, together=2), []

    def draw(settings: SampleSettings, **how: Any) -> list[np.ndarray]:
        return [np.asarray(picture, int) for picture in sample(model, prompts, [3, 4, 5], settings, lora=lora, **how)]

    def differ(first: list[np.ndarray], second: list[np.ndarray]) -> list[bool]:
        return [bool(np.abs(one - other).max() > 3) for one, other in zip(first, second, strict=True)]

    drawn = draw(together, progress=lambda *done: told.append(done))
    assert told == [(2, 3), (3, 3)]
    assert differ(drawn, draw(alone)) == [False] * 3
    assert differ(drawn, draw(together, generics=["a photo of a house in the city"] * 3)) == [True] * 3
    assert differ(drawn, draw(together, single_path=True)) == [True] * 3


def test_pictures_come_in_portions_that_leave_the_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a command that is broken off keeps what was drawn, and another LoRA may be used meanwhile."""
    monkeypatch.setattr(sampling, "AT_A_TIME", 2)
    tiny_pipeline("sd15").save_pretrained(tmp_path)
    model = load(tmp_path)
    settings = SampleSettings(steps=1, size=(64, 64))
    add_lora(model.unet, 2, generator=torch.Generator().manual_seed(0))
    lora = LoraFile(lora_state(model.unet), 2.0, None, {})
    remove_lora(model.unet)
    texts = encode(model, ["a dog"] * 5, settings, lora=lora)
    asked: list[int] = []
    drawn = portions(model, texts, range(5), settings, lora=lora, stop=lambda: asked.append(1) or len(asked) > 2)
    assert len(next(drawn)) == 2
    assert not lora_parameters(model.unet)
    assert [len(portion) for portion in drawn] == [2]  # the third time it is stopped
    expected = sample(model, ["a dog"] * 2, [0, 1], settings, lora=lora)
    again = next(portions(model, texts, range(5), settings, lora=lora))
    assert [picture.tobytes() for picture in again] == [picture.tobytes() for picture in expected]
    with pytest.raises(HollowError, match="There are 5 prompts and 4 seeds"):
        portions(model, texts, range(4), settings)


def test_refusals_are_sentences(tmp_path: Path) -> None:
    tiny_pipeline("sd15").save_pretrained(tmp_path)
    model = load(tmp_path)
    with pytest.raises(HollowError, match=r"There are 3 prompts and 2 seeds\. Give one seed for each prompt\."):
        sample(model, ["a dog"] * 3, [3, 4])
    with pytest.raises(HollowError, match=r"There are 2 prompts and 1 generic ones\. Give one for each prompt\."):
        sample(model, ["a dog"] * 2, [3, 4], generics=["a cat"])
    for seed in (-1, 2**64):
        with pytest.raises(HollowError, match=f"There is no seed {seed}\\. Give a whole number from 0 to 2\\^64 - 1"):
            sample(model, ["a dog"], [seed])


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("together", 0, "0 pictures cannot be drawn together. It must be at least 1."),
        ("steps", 0, "0 denoising steps cannot be. Take from 1 to 1000"),
        ("strength", math.nan, "The strength of a LoRA cannot be nan. Take 1"),
        ("strength", -math.inf, "The strength of a LoRA cannot be -inf. Take 1"),
        ("refresh", 0, "The base path cannot run every 0 steps. Choose a refresh of at least 1."),
        ("guidance", math.nan, "A guidance of nan cannot be. Take 1 for none"),
        ("guidance", math.inf, "A guidance of inf cannot be. Take 1 for none"),
        ("guidance", -1.0, "A guidance of -1.0 cannot be. Take 1 for none"),
        ("size", (512, 0), "The resolution 0 is no multiple of 8 pixels"),
    ],
)
def test_a_number_that_cannot_be_is_refused(name: str, value: Any, sentence: str) -> None:
    with pytest.raises(HollowError) as refused:
        SampleSettings(**{name: value})
    assert sentence in str(refused.value)


def test_the_last_seed_is_one(tmp_path: Path) -> None:
    """As large as ComfyUI draws them; counting up goes on with 0."""
    assert counted_up(2**64 - 2, 4) == [2**64 - 2, 2**64 - 1, 0, 1]
    tiny_pipeline("sd15").save_pretrained(tmp_path)
    model, settings = load(tmp_path), SampleSettings(steps=1, size=(64, 64))
    last, first, again = (sample(model, ["a dog"], [seed], settings)[0].tobytes() for seed in (2**64 - 1, 0, 2**64 - 1))
    assert last == again != first
    latents = class_latents(model, [("a dog", (64, 64))] * 2, tmp_path / "class", made_by="", seed=2**64 - 1, steps=1)
    assert [torch.isfinite(each).all() for each in latents] == [True, True]
    assert not torch.equal(*latents)
