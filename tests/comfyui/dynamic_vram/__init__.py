"""Dynamic VRAM as newer ComfyUIs have it by default on NVIDIA, for tests on the CPU, where main.py leaves it off.

Importing this sets the flag; as a custom node it does so in a server. Layers are then lazy, and take the dtype of the
state dict that they load; files are mapped, for which the loader of comfy-aimdo, which is native and needs a GPU, is
stood in for. So is the patcher of ComfyUI's own models, which has their layers cast what they compute with; a pack's
own ModelPatcher does not.
"""

import ctypes
import mmap
import os
from typing import Any

import comfy.memory_management
import comfy.model_patcher
import comfy_aimdo.model_mmap

NODE_CLASS_MAPPINGS: dict[str, type] = {}


class MappedFile:
    """`comfy_aimdo.model_mmap.ModelMMAP` by Python's own mmap."""

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_RDONLY)
        self.map = mmap.mmap(self.file, 0, access=mmap.ACCESS_COPY)

    def __del__(self) -> None:
        os.close(self.file)

    def get(self) -> int:
        """The address of the file's first byte."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def get_file_handle(self) -> int:
        """The file's number."""
        return self.file

    def bounce(self) -> bool:
        """Let go of pages that were written to: none ever are."""
        return True


class CastingPatcher(comfy.model_patcher.ModelPatcher):
    """As `ModelPatcherDynamic`, which on the CPU is an ordinary one."""

    def load(self, *args: Any, **options: Any) -> Any:
        """Every layer casts its weights at every use."""
        super().load(*args, **options)
        for module in self.model.modules():
            if hasattr(module, "comfy_cast_weights"):
                module.comfy_cast_weights = True


comfy.memory_management.aimdo_enabled = True
comfy.model_patcher.CoreModelPatcher = CastingPatcher
comfy_aimdo.model_mmap.ModelMMAP = MappedFile
