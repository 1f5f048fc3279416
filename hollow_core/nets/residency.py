"""What keeps the frozen weights of a network small, or away: quantised to 8 or 4 bits, or streamed from main memory.

Both make *frozen layers* of its linear and convolution layers: a frozen layer has its weight only while it is
multiplied, once in the forward pass and once more in the backward pass, and nothing of it is kept in between.
It stays an `nn.Linear` or `nn.Conv2d`, the same object, so views share it (`hollow`, `base`) and a LoRA goes on it
as on any other. What a network calls `kept` stays as it is, its first and last layers and its embeddings: they are
few percent, what they make goes into every layer, and others read device and dtype off them. So do the biases and the
normalisations.
"""

import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from ..errors import HollowError
from .network import Cut, Network

Bits = Literal[4, 8]

GROUP = 64
"""Weights that share a scale."""


def quantize(module: nn.Module, bits: Bits, kept: Collection[str] = ()) -> None:
    """Replace the weights of the linear and convolution layers by integers of 8 or 4 bits, in place, for good.

    Symmetric, to nearest: groups of 64 weights in a row share a bfloat16 scale, the largest |w| over 127 or 7,
    so that no weight is further off than half its scale (and 1/256 of itself, what the scale is rounded by).
    A weight takes 8.25 or 4.25 bits. Those parts of the module that are named in `kept`, as `Network.kept`, stay.
    Quantise before `hollow`, precompute and train on the same network.

    This is own code because no library does it: torchao and bitsandbytes quantise linear layers alone, and more
    than half of a U-Net's weights are convolutions; and where torchao's are trained through, the whole
    dequantised weight is kept for the backward pass.

    Raises HollowError for other widths, and for a network that is quantised, streamed, or carries a LoRA.
    """
    if bits not in (4, 8):
        raise HollowError(f"Weights cannot be kept in {bits!r} bits. Choose 8 or 4.")
    if any(layer.bits for layer in _frozen(module)):
        raise HollowError("This network is quantised already. Load it anew for another width.")
    if any(layer.streamer for layer in _frozen(module)):
        raise HollowError("This network is streamed already. Quantise it before.")
    for layer in _freeze(module, kept):
        (weight,) = layer.held
        layer.bits, layer.shape, layer.dtype = bits, weight.shape, weight.dtype
        del layer._parameters["weight"]
        codes, scales = _quantized(weight.detach(), bits)
        layer.register_buffer("codes", codes)
        layer.register_buffer("scales", scales)


def stream(
    part: nn.Module, device: torch.device | str, kept: Collection[str] = (), only: Iterable[str] = ("",)
) -> None:
    """Keep the weights of linear and convolution layers, quantised or not, in main memory, where `.to` leaves them.

    (Pinned for CUDA, which takes up to twice their size.) They visit `device` one ahead of use, forward and
    backward: at most two at a time are there. What is computed is the same bit by bit. `part` is a network's module,
    of which what is named in `kept`, as `Network.kept`, does not stay away, or a text encoder. `only` names those of
    its modules whose weights stay away, all by default; bring the rest to `device` afterwards. Stream before `hollow`.
    Raises HollowError for a part that is streamed or carries a LoRA.
    """
    if any(layer.streamer for layer in _frozen(part)):
        raise HollowError("This network is streamed already. Load it anew for another device.")
    streamer = Streamer(torch.device(device))
    for layer in _freeze(part, kept, only):
        for tensor in layer.held:
            if tensor.is_meta:  # in a dry run, which tells what is away by `away`
                continue
            tensor.data = tensor.data.cpu().pin_memory() if streamer.device.type == "cuda" else tensor.data.cpu()
        layer.streamer = streamer
    part.register_forward_pre_hook(lambda view, _: streamer.begin(view))


def stream_middle(network: Network, cut: Cut, device: torch.device | str) -> None:
    """`stream` what `cut` hollows: until it is gone it visits `device`, so that precomputing has no more weights
    there than training. Raises HollowError as `stream` does, and for a cut out of range."""
    stream(network.module, device, network.kept, network.removed(cut))


def loaded_bytes(part: nn.Module) -> int:
    """What a network or text encoder took as it was loaded, before it was quantised."""
    small = [layer for layer in _frozen(part) if layer.bits]
    codes = {id(tensor) for layer in small for tensor in layer.held}
    others = sum(each.nbytes for each in (*part.parameters(), *part.buffers()) if id(each) not in codes)
    return others + sum(layer.shape.numel() * layer.dtype.itemsize for layer in small)


def away(part: nn.Module) -> list[Tensor]:
    """The tensors of a streamed network or text encoder that are in main memory, not on its device."""
    return [tensor for layer in _frozen(part) if layer.streamer for tensor in layer.held]


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a linear or convolution layer, frozen or not, on the device, for this moment."""
    if isinstance(layer, _FrozenLayer):
        return layer.fetch(layer.dtype if layer.bits else layer.held[0].dtype)
    return cast(Tensor, layer.weight)


class _FrozenLayer(nn.Module):
    """What a frozen linear and a frozen convolution layer have in common; made in place, never constructed."""

    bits: Bits | None = None
    streamer: "Streamer | None" = None
    shape: torch.Size  # of the weight that the codes stand for
    dtype: torch.dtype  # it was loaded in
    codes: Tensor
    scales: Tensor
    bias: Any

    @property
    def held(self) -> tuple[Tensor, ...]:
        """What is kept of the weight: codes and scales, or the whole."""
        if self.bits:
            return self.codes, self.scales
        return (cast(Tensor, self._parameters["weight"]),)

    @property
    def weight(self) -> Tensor:
        """A copy of the whole weight, on the device, for whoever looks at it."""
        if self.bits and self.codes.is_meta:  # in a dry run, of which looks take most of the time
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        held = self.held if self.streamer is None else _Copy(self.held, self.streamer.device, None).tensors
        return self._whole(held, self.dtype if self.bits else self.held[0].dtype)

    def fetch(self, dtype: torch.dtype) -> Tensor:
        """The weight on the device in `dtype`, for this moment."""
        return self._whole(self.held if self.streamer is None else self.streamer.visit(self), dtype)

    def _whole(self, held: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        if self.bits:
            return _dequantized(held[0], held[1], self.shape, dtype)
        # the flag decides how torch folds a product, even without gradients, and so the last bit
        return held[0].detach().to(dtype).requires_grad_(self.held[0].requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Multiply.apply(x, self)
        return y

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer does to `x`."""
        raise NotImplementedError

    def multiply_back(self, gradient: Tensor, weight: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
        """The gradient of an `x` of this shape and these strides, from the result's."""
        raise NotImplementedError

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.detach().to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`.to(device)` moves all but what is streamed."""
        if self.streamer is None:
            return super()._apply(fn, recurse)
        parameters, buffers = self._parameters, self._buffers
        self._parameters, self._buffers = {"bias": self.bias}, {}
        super()._apply(fn, recurse)
        self._parameters, self._buffers = {**parameters, **self._parameters}, buffers
        return self


class FrozenLinear(_FrozenLayer, nn.Linear):  # type: ignore[override]  # its weight is made when asked for
    """A linear layer whose weight is there only while it is multiplied."""

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self._bias(x.dtype))

    def multiply_back(self, gradient: Tensor, weight: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
        if torch.empty_strided(shape, strides, dtype=torch.uint8, device="meta").flatten(0, -2).stride(0) > 1:
            return gradient @ weight
        # a transposed input gets a transposed gradient: as autograd does it, to the last bit
        return (weight.t() @ gradient.flatten(0, -2).t()).t().reshape(shape)


class FrozenConv2d(_FrozenLayer, nn.Conv2d):  # type: ignore[override]
    """A convolution whose weight is there only while it is multiplied."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An ordinary one: so peft makes the matrices of a LoRA, by the class of the layer that they are for."""
        return nn.Conv2d(*args, **kwargs) if args else super().__new__(cls)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self._bias(x.dtype))

    def multiply_back(self, gradient: Tensor, weight: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
        padding, dilation = cast(tuple[int, int], self.padding), self.dilation
        return conv2d_input(shape, weight, gradient, self.stride, padding, dilation, self.groups)


class _Multiply(torch.autograd.Function):
    """A frozen layer's forward pass; backward fetches the weight again, for the gradient of the input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _FrozenLayer) -> Tensor:
        ctx.layer, ctx.shape, ctx.strides = layer, x.shape, x.stride()
        return layer.multiply(x, layer.fetch(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight = ctx.layer.fetch(gradient.dtype)
        return ctx.layer.multiply_back(gradient, weight, ctx.shape, ctx.strides), None


class Streamer:
    """Brings weights from main memory to the device, one ahead of use.

    Who comes next it knows from the last pass through the same view of the network, forward and backward: a pass like
    that finds every weight on its way. In one unlike it, as the first is, a weight is fetched when it is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # in the order in which they were asked for; a layer that was hollowed meanwhile is free to go
        self._orders = weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[_FrozenLayer]]]()
        self._last: list[weakref.ref[_FrozenLayer]] = []
        self._now: list[weakref.ref[_FrozenLayer]] = []
        self._ahead: tuple[_FrozenLayer, _Copy] | None = None
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, view: nn.Module) -> None:
        """A new pass through `view` begins."""
        self._last, self._now = self._orders.get(view, []), []
        self._orders[view] = self._now

    def visit(self, layer: _FrozenLayer) -> list[Tensor]:
        """What `layer` holds, on the device; the one that comes after it is sent for."""
        copy = self._arrived(layer) or _Copy(layer.held, self.device, self._side)
        copy.wait()
        self._now.append(weakref.ref(layer))
        following = self._last[len(self._now)]() if len(self._now) < len(self._last) else None
        if following is not None:
            # where forward turns into backward, the same weight is used again
            again = copy if following is layer else _Copy(following.held, self.device, self._side)
            self._ahead = following, again
        return copy.tensors

    def _arrived(self, layer: _FrozenLayer) -> "_Copy | None":
        """What was sent for ahead if it is what `layer` holds; else it is let go."""
        if self._ahead is None:
            return None
        (expected, copy), self._ahead = self._ahead, None
        if expected is layer:
            return copy
        copy.wait()  # or its memory would be used again while it is still being written
        return None


class _Copy:
    """Tensors on their way to the device.

    Their memory belongs to the main stream, so that it is used again in the order of the computation; the side
    stream starts when all that was asked of the main stream before is done with that memory.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device, side: "torch.cuda.Stream | None") -> None:
        self.tensors = [torch.empty_like(tensor, device=device, requires_grad=False) for tensor in tensors]
        self._device = device
        if side is not None:
            side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side), torch.no_grad():
            for there, here in zip(self.tensors, tensors, strict=True):
                there.copy_(here, non_blocking=True)
            self._arrival = None if side is None else side.record_event()

    def wait(self) -> None:
        """The main stream goes on when they have arrived."""
        if self._arrival is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrival)


def _frozen(part: nn.Module) -> Iterator[_FrozenLayer]:
    return (module for module in part.modules() if isinstance(module, _FrozenLayer))


def _freeze(part: nn.Module, kept: Collection[str], only: Iterable[str] = ("",)) -> list[_FrozenLayer]:
    """The layers in the modules `only` of `part`, but for those `kept`, that are to be frozen, made so where they are
    not yet."""
    if any(isinstance(module, LoraLayer) for module in part.modules()):
        raise HollowError("This network carries a LoRA already. Quantise and stream it before it gets one.")
    inside = [each for path in only for each in part.get_submodule(path).named_modules(prefix=path)]
    for path, module in inside:
        if path.split(".")[0] in kept:
            continue
        if type(module) is nn.Linear:
            module.__class__ = FrozenLinear
        elif type(module) is nn.Conv2d and module.padding_mode == "zeros" and module.padding != "same":
            module.__class__ = FrozenConv2d
    return [module for _, module in inside if isinstance(module, _FrozenLayer)]


def _quantized(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Codes, int8 (groups, 64) or two to a byte (groups, 32), and scales (groups, 1)."""
    if weight.is_meta:  # in a dry run
        number = -(-weight.numel() // GROUP)
        codes = weight.new_empty(number, GROUP * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
        return codes, weight.new_empty(number, 1, dtype=torch.bfloat16)
    top = 127 if bits == 8 else 7
    groups = F.pad(weight.float().flatten(), (0, -weight.numel() % GROUP)).view(-1, GROUP)
    scales = (groups.abs().amax(1, keepdim=True) / top).bfloat16()
    exact = scales.float()
    codes = (groups / exact.where(exact > 0, 1.0)).round().clamp(-top, top).to(torch.int8)
    if bits == 8:
        return codes, scales
    low, high = (codes + 8).view(torch.uint8).chunk(2, dim=1)
    return low | high << 4, scales


def _dequantized(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight of `shape`, written straight in `dtype`: beside it there are only small integers."""
    groups = torch.empty(len(codes), GROUP, dtype=dtype, device=codes.device)
    scales = scales.to(dtype)
    if codes.dtype == torch.int8:
        torch.mul(codes, scales, out=groups)
    else:
        low, high = groups.chunk(2, dim=1)
        torch.mul((codes & 15).view(torch.int8).sub_(8), scales, out=low)
        torch.mul((codes >> 4).view(torch.int8).sub_(8), scales, out=high)
    return groups.flatten()[: shape.numel()].view(shape)
