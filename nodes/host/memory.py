"""Who is on the GPU: while a stage of ours runs, its network and nothing else."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn


class _Held(nn.Module):
    """ComfyUI's loader sets attributes of its own on a module, `device` among them; diffusers' own is read-only."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


@contextmanager
def alone_on_device(network: nn.Module) -> Iterator[torch.device]:
    """While inside, `network` is on the device and counted by ComfyUI, whose own models `clear_device` took off it.

    Afterwards all of it is given back: ComfyUI loads what it needs when it needs it.
    """
    device = comfy.model_management.get_torch_device()
    patcher = ModelPatcher(_Held(network), load_device=device, offload_device=torch.device("cpu"))
    try:
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        yield device
    finally:
        del patcher
        clear_device()


def clear_device() -> None:
    """Take ComfyUI's models off the device, under --highvram and --gpu-only too, where it would keep them there."""
    device = comfy.model_management.get_torch_device()
    for loaded in comfy.model_management.current_loaded_models:
        patcher = loaded.model
        if patcher is not None and patcher.offload_device == device and device.type != "cpu":
            patcher.detach()
            patcher.model.to("cpu")
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()
