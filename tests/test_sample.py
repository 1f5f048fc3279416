"""Pictures are the diffusers pipeline's, although the parts of the model are used one after the other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipelines import tiny_pipeline

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
    drawn = sample(model, ["a dog", "a cat"], [3, 4], settings, device="cpu")
    for one, other in zip(drawn, expected, strict=True):  # a batch of two rounds otherwise
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
