"""Who is on the GPU: while a stage of ours runs, its network and nothing else."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn


def free_bytes(model: ModelPatcher) -> int:
    """What training on `model` may have of the device's memory, once ComfyUI's own models are off it.

    ComfyUI's count is of what it can have without unloading; to it comes what its models hold. Under dynamic VRAM
    they lie in pages of an allocator of its own, which torch does not know and a MODEL counts as free already.
    On the CPU that is main memory, and the weights that are there already: training shares them.
    """
    management, device = comfy.model_management, comfy.model_management.get_torch_device()
    count = getattr(model, "get_free_memory", management.get_free_memory)  # of older hosts, without dynamic VRAM
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
    elif device.type == "cpu":
        held = model.model_size()
    else:
        loaded = [each for each in management.current_loaded_models if each.device == device]
        held = sum(each.model_loaded_memory() for each in loaded)
    return int(count(device) + held)


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
