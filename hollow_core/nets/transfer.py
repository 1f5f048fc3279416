"""Tensors on their way between main memory and a device, without Python waiting for either."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor`, which is not expanded, on `device` in `dtype` (None: its own), to be used by what the device is asked
    for from here on.

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
            name: torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(
                tensor, non_blocking=_never_waits(device)
            )
            for name, tensor in tensors.items()
        }
        self._arrival = torch.cuda.Event(blocking=True) if device.type == "cuda" else None  # who waits may sleep
        if self._arrival is not None:
            self._arrival.record(torch.cuda.current_stream(device))

    def wait(self) -> dict[str, Tensor]:
        """All of them, once they have arrived."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._tensors


class Copies:
    """Copies of tensors of one device and precision in main memory, where they take nothing of the device's, made anew
    without waiting. (Pinned for CUDA: torch keeps such memory for what it pins next.)"""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, (_, self._copies) = list(tensors), room_like(tensors, "cpu", pinned=tensors[0].is_cuda)

    @torch.no_grad()
    def take(self) -> None:
        """Copy them as they are when the device is done with what it was asked before."""
        torch._foreach_copy_(self._copies, self._tensors, non_blocking=_never_waits(self._tensors[0].device))

    @torch.no_grad()
    def give_back(self) -> None:
        """Make the tensors what they were at the last `take`."""
        torch._foreach_copy_(self._tensors, self._copies)


def room_like(
    tensors: Sequence[Tensor], device: torch.device | str, *, pinned: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """One tensor on `device` with room for all of these, of one precision, and views of it in their shapes."""
    sizes = [tensor.numel() for tensor in tensors]
    flat = torch.empty(sum(sizes), device=device, dtype=tensors[0].dtype, pin_memory=pinned)
    return flat, [part.view(tensor.shape) for part, tensor in zip(flat.split(sizes), tensors, strict=True)]


def _never_waits(device: torch.device) -> bool:
    """Whether copies may be left to themselves: elsewhere they might be read before they are whole."""
    return device.type in ("cuda", "meta")  # which is CUDA in a dry run
