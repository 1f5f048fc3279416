"""The pack in a real ComfyUI."""

import pytest

pytest.importorskip("comfy", reason="COMFYUI_DIR names no checkout of ComfyUI")

import comfy.model_management


def test_comfyui_runs_on_the_cpu() -> None:
    assert comfy.model_management.get_torch_device().type == "cpu"
