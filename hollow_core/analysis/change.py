"""How much a LoRA changes one module: the paper's Eq. 3, the norm, the ranks it needs; and sums of such changes."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import HollowError
from ..lora.delta import LoraLayer

CHUNK = 2**18  # elements of ΔW that exist at once: they stay in the processor's cache
KEPT = 0.95  # of the squared norm: what an effective rank keeps


class Change(NamedTuple):
    """Of one module, or of several taken together."""

    weights: int
    """How many carry LoRA."""
    total: float
    """Σ|w - w'|."""
    squares: tuple[float, ...]
    """By rank, from the largest: the squared singular values of ΔW, added up over the modules that have LoRA."""
    squared: float
    """‖ΔW‖², Frobenius; the sum of `squares` unless there are DoRA's magnitudes or full differences."""
    base_squared: float | None
    """‖W‖² of the same weights; None without a base model."""

    @property
    def mean(self) -> float:
        """ΔW of Eq. 3: the mean of |w - w'| over the weights that carry LoRA."""
        return self.total / self.weights

    @property
    def relative(self) -> float | None:
        """‖ΔW‖ / ‖W‖; None without a base model."""
        return math.sqrt(self.squared / self.base_squared) if self.base_squared else None

    @property
    def effective_rank(self) -> int:
        """The smallest rank that keeps KEPT of ‖ΔW‖²; 0 where nothing changes."""
        return next((rank for rank in range(len(self.squares) + 1) if self.kept(rank) >= KEPT), len(self.squares))

    def kept(self, rank: int) -> float:
        """The share of ‖ΔW‖² that is left where every module is cut down to its best `rank`."""
        whole = sum(self.squares)
        return sum(self.squares[:rank]) / whole if whole else 1.0


@torch.no_grad()
def measure(layer: LoraLayer, weight: Tensor | None = None) -> Change:
    """The change of one module; `weight` is the base's, in any dtype, its shape that of ΔW or (out, in, 1, 1).

    ΔW exists in blocks of rows only. Its singular values are those of the product of two small triangular
    factors, B = Q₁R₁ and Aᵀ = Q₂R₂ so that ‖BA‖ = ‖R₁R₂ᵀ‖. With DoRA's magnitudes the change is that of the whole
    weight, m·(W + BA)/‖W + BA‖ - W, by outputs or inputs, for which `weight` is needed; without it, that of BA alone.
    Raises HollowError for a weight of another size.
    """
    up, down = layer.up.flatten(1).float(), layer.down.flatten(1).float()
    if weight is not None and weight.numel() != len(up) * down.shape[1]:
        raise HollowError(
            f"The LoRA changes {len(up)} × {down.shape[1]} weights, the model has {tuple(weight.shape)} there. "
            "Give the model that it was made for."
        )
    whole = layer.dora_scale is not None and weight is not None
    total, squared, base_squared = 0.0, 0.0, 0.0
    base = None if weight is None else weight.reshape(len(up), -1)
    factors = None if base is None or layer.dora_scale is None else _magnifications(layer, base)
    for rows in _row_blocks(len(up), down.shape[1]):
        difference = layer.scale * up[rows] @ down
        if base is not None:
            of_base = base[rows].float()
            base_squared += of_base.square().sum().item()
            if factors is not None:
                factor = factors if layer.by_input else factors[rows]
                difference = factor * (of_base + difference) - of_base
        if whole:
            squared += difference.square().sum().item()
        total += difference.abs_().sum().item()  # pairwise, as `sum` adds up, where `norm` would lose digits
    left, right = (torch.linalg.qr(matrix, mode="r").R for matrix in (up, down.T))
    squares = (layer.scale * torch.linalg.svdvals(left @ right.T)).double().square().tolist()
    return Change(
        weights=len(up) * down.shape[1],
        total=total,
        squares=tuple(squares),
        squared=squared if whole else sum(squares),
        base_squared=None if weight is None else base_squared,
    )


@torch.no_grad()
def measure_difference(difference: Tensor, weight: Tensor | None = None) -> Change:
    """The change of one module whose ΔW stands in the file as it is, without ranks; `weight` as in `measure`, whose
    size it must have, or HollowError is raised."""
    if weight is not None and weight.numel() != difference.numel():
        raise HollowError(
            f"The file changes {difference.numel()} weights, the model has {tuple(weight.shape)} there. Give the model "
            "that it was made for."
        )
    difference = difference.float()
    return Change(
        weights=difference.numel(),
        total=difference.abs().sum().item(),
        squares=(),
        squared=difference.square().sum().item(),
        base_squared=None if weight is None else weight.float().square().sum().item(),
    )


def together(changes: Iterable[Change]) -> Change | None:
    """Several modules as one: sums, so that norms add up by root-sum-square. None for none."""
    changes = list(changes)
    if not changes:
        return None
    bases = [change.base_squared for change in changes if change.base_squared is not None]
    longest = max(len(change.squares) for change in changes)
    padded = [change.squares + (0.0,) * (longest - len(change.squares)) for change in changes]
    return Change(
        weights=sum(change.weights for change in changes),
        total=sum(change.total for change in changes),
        squares=tuple(map(sum, zip(*padded, strict=True))),
        squared=sum(change.squared for change in changes),
        base_squared=sum(bases) if len(bases) == len(changes) else None,
    )


def _magnifications(layer: LoraLayer, base: Tensor) -> Tensor:
    """m / ‖W + ΔW‖ of a DoRA: (out, 1), or (1, in · kernel) of one by inputs."""
    assert layer.dora_scale is not None
    up, down = layer.up.flatten(1).float(), layer.down.flatten(1).float()
    of_rows, of_columns = [], torch.zeros(down.shape[1])
    for rows in _row_blocks(len(up), down.shape[1]):
        squares = (base[rows].float() + layer.scale * up[rows] @ down).square()
        of_rows.append(squares.sum(1))
        of_columns += squares.sum(0)
    into = layer.down.shape[1]
    squared = of_columns.view(into, -1).sum(1) if layer.by_input else torch.cat(of_rows)
    factors = layer.dora_scale.flatten().float() / squared.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return factors.repeat_interleave(down.shape[1] // into)[None] if layer.by_input else factors[:, None]


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, CHUNK // columns)
    yield from (slice(start, start + step) for start in range(0, rows, step))
