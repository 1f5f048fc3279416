"""Who is on the GPU: while a stage of ours runs, its network and nothing else."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...hollow_core.memory import meter


def free_bytes(model: ModelPatcher) -> int:
    """What training on `model` may have of the device's memory, once ComfyUI's own models are off it.

    On the CPU that is main memory, and the weights that are there already: training shares them.
    """
    management, device = comfy.model_management, comfy.model_management.get_torch_device()
    if device.type == "cuda":
        return meter.free_bytes(device)
    if device.type == "cpu":
        return int(management.get_free_memory(device) + model.model_size())
    loaded = (each.model_loaded_memory() for each in management.current_loaded_models if each.device == device)
    return int(management.get_free_memory(device) + sum(loaded))


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
        nn.Module.to(network, device)  # under --novram ComfyUI has left it on the CPU
        yield device
    finally:
        del patcher
        clear_device()


def clear_device(*models: ModelPatcher) -> None:
    """Take ComfyUI's models off the device; under --highvram and --gpu-only, where it would keep them there, and need
    not know of them all, `models` too."""
    device, cpu = comfy.model_management.get_torch_device(), torch.device("cpu")
    known = (loaded.model for loaded in comfy.model_management.current_loaded_models)
    staying = [each for each in (*known, *models) if each is not None and each.offload_device == device != cpu]
    comfy.model_management.unload_all_models()
    for patcher in staying:
        patcher.model.to(cpu)
        patcher.model.device = cpu
    gc.collect()
    comfy.model_management.soft_empty_cache()
