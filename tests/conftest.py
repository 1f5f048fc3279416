"""Fixtures that every test may use."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_transformer_pipelines import save_tiny_pipeline
from tiny_unets import make_tiny_conditioning, make_tiny_unet

from hollow_core.models.layouts import LAYOUTS
from hollow_core.nets.conditioning import Conditioning

torch.set_num_threads(1)  # on tensors this small threads only wait for one another


@pytest.fixture
def tiny_unet() -> Callable[..., UNet2DConditionModel]:
    """The factory: `tiny_unet("sd21")`, and `tiny_unet("sdxl", layers_per_block=1)` for a changed config."""
    return make_tiny_unet


@pytest.fixture
def tiny_conditioning() -> Callable[..., Conditioning]:
    """The factory: `tiny_conditioning(unet, batch=2, seed=1)`."""
    return make_tiny_conditioning


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    """Runs the test once for each of the three layouts."""
    return request.param


@pytest.fixture(scope="session")
def transformer_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The diffusers folder of a tiny pipeline of a family, by its name; nobody writes into it."""

    @cache
    def folder(name: str) -> Path:
        return save_tiny_pipeline(name, tmp_path_factory.mktemp(name) / "model")

    return folder
