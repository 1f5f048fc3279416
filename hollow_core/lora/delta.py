"""What a LoRA does to one layer, apart from how a file spells it."""

from typing import NamedTuple

from torch import Tensor


class LoraLayer(NamedTuple):
    """ΔW = (alpha / rank) · up · down, with the numbers as the file has them."""

    down: Tensor
    """(rank, in) or (rank, in, kernel height, kernel width)."""
    up: Tensor
    """(out, rank) or (out, rank, 1, 1)."""
    alpha: float
    """Where a file has none, or zero, it is the rank."""
    dora_scale: Tensor | None = None
    """DoRA's magnitudes, one an output; None for a plain LoRA."""

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / len(self.down)
