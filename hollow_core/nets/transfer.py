"""Tensors on their way between main memory and a device, without Python waiting for either."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor` on `device` in `dtype` (None: its own), to be used by what the device is asked for from here on.

    On the way to CUDA it is converted first, and leaves from pinned memory, so that nothing waits. Other devices wait
    as `.to` does.
    """
    device = torch.device(device)
    if tensor.device.type != "cpu" or not _never_waits(device):
        return tensor.to(device, dtype)
    tensor = tensor.to(dtype=dtype)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class Arriving:
    """Tensors of a device on their way to main memory, whatever the device does next."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        device = next(iter(tensors.values())).device
        self._tensors = {
            name: _room(tensor).copy_(tensor, non_blocking=_never_waits(device)) for name, tensor in tensors.items()
        }
        self._arrival = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def wait(self) -> dict[str, Tensor]:
        """All of them, once they have arrived."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._tensors


class Copies:
    """Copies of tensors in main memory, where they take nothing of the device's, made anew without waiting."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._copies = tensors, [_room(tensor) for tensor in tensors]

    @torch.no_grad()
    def take(self) -> None:
        """Copy them as they are when the device is done with what it was asked before."""
        torch._foreach_copy_(self._copies, list(self._tensors), non_blocking=_never_waits(self._tensors[0].device))

    @torch.no_grad()
    def give_back(self) -> None:
        """Make the tensors what they were at the last `take`."""
        torch._foreach_copy_(list(self._tensors), self._copies)


def _never_waits(device: torch.device) -> bool:
    """Whether copies may be left to themselves: elsewhere they might be read before they are whole."""
    return device.type in ("cuda", "meta")  # which is CUDA in a dry run


def _room(tensor: Tensor) -> Tensor:
    """Of its size in main memory, pinned for CUDA."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
