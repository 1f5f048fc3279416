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
    """DoRA's magnitudes: (out,), of each output, or (1, in), of each input; None for a plain LoRA."""

    @property
    def by_input(self) -> bool:
        """Whether it is a DoRA with a magnitude for each input, W' = m (W + ΔW) / ‖W + ΔW‖ column by column."""
        return self.dora_scale is not None and self.dora_scale.dim() == 2

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / len(self.down)
