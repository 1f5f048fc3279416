"""Dynamic VRAM as newer ComfyUIs have it by default on NVIDIA, for tests on the CPU, where main.py leaves it off.

Importing this sets the flag; as a custom node it does so in a server. Layers are then lazy, and take the dtype of the
state dict that they load; files are mapped, for which the loader of comfy-aimdo, which is native and needs a GPU, is
stood in for. Models on the CPU keep to the old patcher.
"""

import ctypes
import mmap
import os

import comfy.memory_management
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


comfy.memory_management.aimdo_enabled = True
comfy_aimdo.model_mmap.ModelMMAP = MappedFile
