"""LoRA layers by peft: put in, switched, read out, taken away. The base's weights stay frozen.

A layer with LoRA computes W x + s (alpha / rank) B A x, with strength s (1 unless set). One with DoRA (Liu et al. 2024,
arXiv 2402.09353) trains a magnitude m for each output, too: W + ΔW is brought to it, m (W + ΔW) / ‖W + ΔW‖, row by row.
Files of others may have one for each input, and bring it there column by column.
"""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from ..errors import HollowError
from ..nets.families import FAMILIES
from ..nets.residency import weight_of
from ..nets.unet_layers import ALL_LAYERS as ALL_LAYERS
from ..nets.unet_layers import ATTENTION as ATTENTION

MAGNITUDES = "lora_magnitude_vector"
"""peft's name for DoRA's magnitudes in a state."""

_ADAPTER = "hollow"  # the name under which peft keeps our layers


def add_lora(
    unet: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = ATTENTION,
    *,
    within: tuple[str, ...] = ("",),
    dora: bool = False,
    generator: torch.Generator,
) -> None:
    """Put fresh LoRA layers into `unet` in place of any that are there; its output does not change yet.

    A is drawn from the CPU `generator` (kaiming uniform, as peft does), B is zero, and with `dora` the magnitudes are
    the norms of W; all are fp32 and all that is trainable. `alpha` None means alpha = rank. `targets` are names, or the
    ends of names, of linear and convolution layers whose paths begin as one of `within`. Raises HollowError for a rank
    below 1 and for a target that cannot carry a LoRA.
    """
    if rank < 1:
        raise HollowError(f"A LoRA of rank {rank} holds nothing. Choose a rank of at least 1.")
    _make_room(unet)
    paths = lora_paths(unet, targets, within)
    _inject(unet, paths, rank, rank if alpha is None else alpha, dora=dora)
    for key, matrix in named_lora_parameters(unet).items():
        if MAGNITUDES in key:
            continue
        fresh = torch.zeros(matrix.shape)
        if key.endswith("lora_A.weight"):
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
        matrix.data.copy_(fresh)


def lora_paths(unet: nn.Module, targets: Sequence[str], within: tuple[str, ...] = ("",)) -> list[str]:
    """Where `add_lora` puts layers. Raises HollowError for a target that is nowhere."""
    possible = [
        path
        for path, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and path.startswith(within)
    ]
    for target in targets:
        if not any(f".{path}".endswith(f".{target}") for path in possible):
            raise HollowError(f"This network has no layer {target!r} to put a LoRA on. Check the targets.")
    ends = tuple(f".{target}" for target in targets)
    return [path for path in possible if f".{path}".endswith(ends)]


def load_lora_state(unet: nn.Module, state: Mapping[str, Tensor], alpha: float) -> None:
    """Put the LoRA of `state` (as `lora_state` gives it) into `unet` in place of any that is there.

    Targets and ranks are those of `state`, and so is whether it is a DoRA. Raises HollowError, and changes nothing,
    where a key or a shape does not fit `unet`.
    """
    paths = list(dict.fromkeys(key.rsplit(".lora_", 1)[0] for key in state))
    ranks = {path: _checked_rank(unet, path, state) for path in paths}
    if not ranks:
        raise HollowError("The LoRA holds no matrices. Get or make the file again.")
    rank = max(ranks.values())
    _make_room(unet)
    lower = {path: lower for path, lower in ranks.items() if lower < rank}
    by_input = {path for path in paths if state.get(f"{path}.{MAGNITUDES}.weight", torch.empty(0)).dim() == 2}
    _inject(unet, paths, rank, alpha, lower, dora=is_dora(state), by_input=by_input)
    for key, matrix in named_lora_parameters(unet).items():
        matrix.data.copy_(state[key])


def is_dora(state: Mapping[str, Tensor]) -> bool:
    """Whether a LoRA, as `lora_state` gives it, sets magnitudes."""
    return any(MAGNITUDES in key for key in state)


def lora_state(unet: nn.Module) -> dict[str, Tensor]:
    """A snapshot on the CPU of every LoRA matrix: {"down_blocks.0.….to_q.lora_A.weight": (rank, in), …};
    magnitudes are "….lora_magnitude_vector.weight" (out,), or (1, in) where they are of inputs."""
    return snapshot(named_lora_parameters(unet))


def snapshot(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which later changes leave alone."""
    return {key: matrix.detach().to("cpu", copy=True) for key, matrix in parameters.items()}


def named_lora_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Every trainable LoRA matrix of `unet`, and DoRA's magnitudes, by their names in `lora_state`, in the order of its
    modules."""
    return {
        f"{path}.{name}.weight": getattr(layer, name)[_ADAPTER].weight
        for path, layer in _lora_layers(unet)
        for name in ("lora_A", "lora_B", MAGNITUDES)
        if _ADAPTER in getattr(layer, name)
    }


def lora_parameters(unet: nn.Module) -> list[nn.Parameter]:
    """The matrices alone, without their names."""
    return list(named_lora_parameters(unet).values())


def set_strength(unet: nn.Module, strength: float) -> None:
    """Scale what the LoRA adds: 0 is nothing, 1 as trained."""
    for _, layer in _lora_layers(unet):
        layer.set_scale(_ADAPTER, strength)


@contextmanager
def lora_off(layers: Sequence[Any]) -> Iterator[None]:
    """While inside, these layers, of `layers_of_any_lora`, compute without any LoRA, at no cost."""
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True  # peft's public switch would also change what is trainable
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


@contextmanager
def lora_strength(unet: nn.Module, strength: float) -> Iterator[None]:
    """While inside, what any LoRA adds, whoever put it in and however strong it is set, counts so many times."""
    layers = layers_of_any_lora(unet)
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scale_layer(strength)
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def remove_lora(unet: nn.Module) -> None:
    """Take the LoRA layers out again; the layers of `unet` are what they were before."""
    for path, layer in list(_lora_layers(unet)):
        parent, _, name = path.rpartition(".")
        setattr(unet.get_submodule(parent), name, layer.get_base_layer())


def _make_room(unet: nn.Module) -> None:
    if hasattr(unet, "peft_config"):
        raise HollowError("This network carries another LoRA. Unload it first (fuse it, if it is to have an effect).")
    remove_lora(unet)


def _inject(
    unet: nn.Module,
    targets: list[str],
    rank: int,
    alpha: float,
    ranks: Mapping[str, int] | None = None,
    *,
    dora: bool,
    by_input: Container[str] = (),
) -> None:
    config = LoraConfig(r=rank, target_modules=targets, rank_pattern=dict(ranks or {}), use_dora=dora)
    config.lora_alpha = alpha  # type: ignore[assignment]  # peft declares an int, and scales by any number
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # peft draws weights of its own, which both callers overwrite
        inject_adapter_in_model(config, unet, _ADAPTER)
    # Views copy attributes, so this one would outlive the layers; they alone tell whether there is a LoRA.
    del unet.peft_config
    for path, layer in _lora_layers(unet):
        layer.cast_input_dtype_enabled = False
        for matrix in (layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]):
            matrix.__class__ = _LoraConv2d if isinstance(matrix, nn.Conv2d) else _LoraLinear
            matrix.weight.data = matrix.weight.data.float()
        if dora:
            (_MagnitudesOfInputs if path in by_input else _Magnitudes).take_over(layer)


class _LoraLinear(nn.Linear):
    """Computes in the precision of its input. peft would bring the input to the matrix's own, and each of the
    layers that share an input would keep a copy of it, twice its size, for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class _LoraConv2d(nn.Conv2d):
    """The same."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype), None)


class _Magnitudes(DoraLinearLayer):
    """peft's layer of magnitudes, (out,) for a convolution, too. It finds ‖W + ΔW‖ without making ΔW, and in float32
    where the base is not: peft would round both to the base's precision, and so change what a fresh one puts out, by
    as much as a short training does.
    """

    trained_scaling: float
    squared: Tensor
    """‖W‖² of each output, (out,)."""

    @classmethod
    @torch.no_grad()
    def take_over(cls, layer: Any) -> None:
        """In place of peft's, with the magnitudes of the base."""
        magnitudes = layer.lora_magnitude_vector[_ADAPTER]
        magnitudes.__class__ = cls
        magnitudes.trained_scaling = layer.scaling[_ADAPTER]
        squared = cls.squares(weight_of(layer.get_base_layer()))
        magnitudes.weight = nn.Parameter(squared.sqrt())
        magnitudes.register_buffer("squared", squared, persistent=False)

    @staticmethod
    def squares(weight: Tensor) -> Tensor:
        """‖W‖² as `squared` has it."""
        return torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=torch.float32).square()

    def forward(  # type: ignore[override]
        self, x: Tensor, *, lora_A: Any, lora_B: Any, scaling: float, base_layer: Any, base_result: Tensor,
        **_: Any,
    ) -> Tensor:  # fmt: skip
        """What is to be added to `base_result`, what the base makes of `x`."""
        change = lora_B(lora_A(x)) * self.trained_scaling
        changed = _without_bias(base_result, base_layer) + change
        added = torch.addcmul(change, changed, self._stretch(x, lora_A, lora_B, base_layer))
        return added if scaling == self.trained_scaling else added * (scaling / self.trained_scaling)

    def _stretch(self, x: Tensor, lora_A: Any, lora_B: Any, base_layer: Any) -> Tensor:
        """m / ‖W + ΔW‖ - 1, which is small, so that half precision does not swallow it; shaped to multiply `x`."""
        norms = self._norms(weight_of(base_layer), weight_of(lora_A), weight_of(lora_B))
        stretch = (self.weight / norms - 1).to(x.dtype)
        return stretch.view(-1, 1, 1) if isinstance(base_layer, nn.Conv2d) else stretch.view(-1)

    @torch.no_grad()  # as a constant, as in section 4.3 of the paper
    def _norms(self, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """‖W + sBA‖ as `squared` has it: ‖W‖² + 2s ⟨W, BA⟩ + s² ‖BA‖²."""
        across, own = self._products(weight, down, up)
        squared = self.squared + 2 * self.trained_scaling * across + self.trained_scaling**2 * own
        return squared.clamp_min(torch.finfo(torch.float32).tiny).sqrt()  # a row of zeros stays one

    def _products(self, weight: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """⟨W, BA⟩ and ‖BA‖² of each output, (out,), of small matrices alone."""
        weight, down, up = weight.flatten(1), down.flatten(1), up.flatten(1)
        across = ((weight @ down.to(weight.dtype).T) * up).sum(1, dtype=torch.float32)
        return across, (up @ (down @ down.T) * up).sum(1)


class _MagnitudesOfInputs(_Magnitudes):
    """The same of inputs, (1, in), a convolution's over its kernel; `squared` is of each input, too. The base layer
    runs twice, as its own result no longer tells the inputs apart."""

    @staticmethod
    def squares(weight: Tensor) -> Tensor:
        """‖W‖² of each input, (1, in)."""
        norms = torch.linalg.vector_norm(weight.transpose(0, 1).flatten(1), dim=1, dtype=torch.float32)
        return norms.square()[None]

    def forward(  # type: ignore[override]
        self, x: Tensor, *, lora_A: Any, lora_B: Any, scaling: float, base_layer: Any, base_result: Tensor,
        **_: Any,
    ) -> Tensor:  # fmt: skip
        """What is to be added to `base_result`, what the base makes of `x`."""
        more = x * self._stretch(x, lora_A, lora_B, base_layer)
        added = _without_bias(base_layer(more), base_layer) + lora_B(lora_A(x + more)) * self.trained_scaling
        return added if scaling == self.trained_scaling else added * (scaling / self.trained_scaling)

    def _products(self, weight: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        into = weight.shape[1]
        weight, down, up = weight.flatten(1), down.flatten(1), up.flatten(1)
        across = (up.to(weight.dtype).T @ weight) * down
        own = (up.T @ up @ down) * down
        across, own = (each.sum(0, dtype=torch.float32).view(into, -1).sum(1)[None] for each in (across, own))
        return across, own


def _without_bias(result: Tensor, base_layer: Any) -> Tensor:
    if base_layer.bias is None:
        return result
    by_output = (-1, 1, 1) if isinstance(base_layer, nn.Conv2d) else (-1,)
    return result - base_layer.bias.to(result.dtype).view(by_output)


def _lora_layers(unet: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in unet.named_modules():
        if isinstance(module, LoraLayer) and _ADAPTER in module.lora_A:
            yield path, module


def layers_of_any_lora(unet: nn.Module) -> list[Any]:
    """Those that carry a LoRA, whoever put it in."""
    return [module for module in unet.modules() if isinstance(module, LoraLayer)]


def _checked_rank(unet: nn.Module, path: str, state: Mapping[str, Tensor]) -> int:
    """The rank of the LoRA on `path`, or a HollowError saying why it does not fit there."""
    advice = "Use it with the kind of model on which it was trained."
    family = FAMILIES.get(type(unet).__name__)
    called = "this U-Net" if family is None else family.title
    down, up = state.get(f"{path}.lora_A.weight"), state.get(f"{path}.lora_B.weight")
    if down is None or up is None:
        raise HollowError(f"The LoRA has only one of two matrices for {path}. Get or make the file again.")
    try:
        module: Any = unet.get_submodule(path)
        base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
        weight: Tensor = base.weight
    except AttributeError:
        raise HollowError(f"The LoRA changes {path}, which {called} has not. {advice}") from None
    given = state.get(f"{path}.{MAGNITUDES}.weight", torch.empty(0))
    if is_dora(state) and given.shape not in ((len(up),), (1, down.shape[1])):
        raise HollowError(
            f"The DoRA has {given.numel()} magnitudes for {path}, not {len(up)}. Get or make the file again."
        )
    rank = down.shape[0]
    expected = (rank, *weight.shape[1:]), (weight.shape[0], rank, *[1] * (weight.dim() - 2))
    if (tuple(down.shape), tuple(up.shape)) != expected:
        raise HollowError(
            f"The LoRA for {path} has shapes {tuple(down.shape)} and {tuple(up.shape)}, but {called} needs "
            f"{expected[0]} and {expected[1]}. {advice}"
        )
    return rank
