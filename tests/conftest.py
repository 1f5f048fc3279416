"""Fixtures that every test may use."""

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
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
