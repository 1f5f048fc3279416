"""Counts the bytes of a GPU while real code runs on tensors that hold no data: no GPU, no weights, seconds.

Tensors on PyTorch's "meta" device have shapes and storages, but no memory. While inside a `DryRun` they stand
for those on a GPU: each storage is counted from the moment it is made until nothing refers to it any more,
and two things happen as on CUDA that the meta device does otherwise: attention never makes its matrix of scores,
and values that Python asks for are there (all of them 1).
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

KINDS = ("weights", "lora", "gradients", "optimizer", "activations", "workspace")
"""What bytes are for; "activations" are all tensors that are none of the others."""

BLOCK = 512
"""CUDA's caching allocator gives out multiples of this many bytes."""

WORKSPACE = 2 * 4096 * 2**10 + 8 * 16 * 2**10
"""What cuBLAS gets from PyTorch on each thread that computes (":4096:2:16:8"; 32 MiB on Hopper and later).

Not counted is what cuDNN borrows during a convolution: it depends on the GPU and on cuDNN's version.
"""


@dataclass(frozen=True)
class Peak:
    """The bytes at the fullest moment, by what they are for."""

    bytes: Mapping[str, int]
    main_memory: int = 0
    """Bytes of weights and records in main memory at most, beside those on the device."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.bytes.values())


class DryRun:
    """`with DryRun() as run:` … then `run.peak()` and `run.flops`."""

    def __init__(self) -> None:
        self._ledger = _Ledger()
        self._stack = ExitStack()

    def __enter__(self) -> "DryRun":
        self._stack.enter_context(_optimizer_hooks(self._ledger))
        self._stack.enter_context(_Gpu())
        self._stack.enter_context(self._ledger)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def hold(self, kind: str, *modules: nn.Module) -> None:
        """Count parameters and buffers that are there already."""
        for module in modules:
            self._ledger.name(kind, [*module.parameters(), *module.buffers()])

    def name(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Say what tensors are that the run has made."""
        self._ledger.name(kind, tensors)

    @property
    def flops(self) -> int:
        """Floating-point operations so far, a multiply-add counted as two."""
        return self._ledger.flops

    def peak(self) -> Peak:
        """The fullest moment. One step is enough: what an optimizer keeps from step to step counts from the
        start, as it is there in every step but the first."""
        return self._ledger.peak()


class _Ledger(TorchDispatchMode):
    """Writes down each storage that comes and goes; what it was for is often known only later."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[tuple[int, int]] = []  # (number of the storage, bytes more)
        self.kinds: dict[int, str] = {}  # by number
        self.flops = 0
        self.backward = False
        self._numbers: dict[int, int] = {}  # of the storages alive, by address
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._alike = Alike()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and _is_host(kwargs.get("device")):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]
        if func is torch.ops.aten._foreach_copy_.default and args[1][0].is_meta and not args[0][0].is_meta:
            return None
        out = self._alike.of(func, args, kwargs)
        packet = func.overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
            self.backward = self.backward or torch._C._current_autograd_node() is not None
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self.number(tensor)
        return out

    def number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if (known := self._numbers.get(address)) is not None:
            return known
        number, size = len(self.changes), -(-storage.nbytes() // BLOCK) * BLOCK
        self.changes.append((number, size))
        self._numbers[address] = number
        self._alive[address] = weakref.ref(storage, partial(self._gone, address, number, size))
        return number

    def name(self, kind: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.is_meta:
                self.kinds[self.number(tensor)] = kind

    def peak(self) -> Peak:
        standing = Counter({"workspace": WORKSPACE * (2 if self.backward else 1) if self.flops else 0})
        for number, more in self.changes:
            if more > 0 and self.kinds.get(number) == "optimizer":
                standing["optimizer"] += more
        fullest, most, total = 0, 0, 0
        changes = [(self.kinds.get(number, "activations"), more) for number, more in self.changes]
        changes = [change for change in changes if change[0] != "optimizer"]
        for moment, (_, more) in enumerate(changes):
            total += more
            if total > most:
                fullest, most = moment, total
        for kind, more in changes[: fullest + 1]:
            standing[kind] += more
        return Peak({kind: standing[kind] for kind in KINDS})

    def _gone(self, address: int, number: int, size: int, _: object) -> None:
        self.changes.append((number, -size))
        del self._numbers[address], self._alive[address]


class Alike(TorchDispatchMode):
    """What operations without data give takes Python long to find out: asked again with tensors of the same shapes, as
    alike blocks do, those that make new tensors make the like inside, and those with `out` give it."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Any, bool] = {}  # whether an operation is one of these
        self._made: dict[Any, Any] = {}  # whether several, and shape, strides and dtype of each, by what was asked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.of(func, args, kwargs or {})

    def of(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`func(*args, **kwargs)`, or the like."""
        if func not in self._known:
            schema = func._schema
            views = any(each.alias_info for each in (*schema.arguments, *schema.returns))
            self._known[func] = "out" in kwargs or not views
        if not self._known[func]:
            return func(*args, **kwargs)
        key = func, _asked(args), _asked(kwargs)
        if key not in self._made:
            out = func(*args, **kwargs)
            parts = out if isinstance(out, tuple) else (out,)
            if all(isinstance(each, Tensor) and each.is_meta for each in parts):
                self._made[key] = isinstance(out, tuple), [(each.shape, each.stride(), each.dtype) for each in parts]
            return out
        if "out" in kwargs:
            return kwargs["out"]
        several, like = self._made[key]
        new = [torch.empty_strided(size, strides, dtype=dtype, device="meta") for size, strides, dtype in like]
        return tuple(new) if several else new[0]


def _asked(value: Any) -> Any:
    """An argument, a tensor by all but its content."""
    if isinstance(value, Tensor):
        return value.device, value.dtype, value.shape, value.stride()
    if isinstance(value, list | tuple):
        return type(value), *map(_asked, value)
    if isinstance(value, dict):
        return tuple((name, _asked(each)) for name, each in value.items())
    return type(value), value


class _Gpu(TorchFunctionMode):
    """What CUDA does and the meta device does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return self._backward(args[0])
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        """`loss.backward()` with this mode on, which would be off there: checkpoints are computed again."""
        engine = torch.autograd.Variable._execution_engine
        with self:
            ones = (torch.ones_like(loss),)
            engine.run_backward((loss,), ones, False, False, (), allow_unreachable=True, accumulate_grad=True)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """By the kernel that CUDA takes for float32; those for half precision allocate the same."""
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, keep, dropout_p, is_causal, scale=scale
    )[0]
    return out


def _optimizer_hooks(ledger: _Ledger) -> ExitStack:
    """Names what belongs to an optimizer as it steps."""

    def before(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            ledger.name("lora", group["params"])
            ledger.name("gradients", [each.grad for each in group["params"] if each.grad is not None])

    def after(optimizer: torch.optim.Optimizer, *_: object) -> None:
        ledger.name("optimizer", _tensors(optimizer.state.values()))

    stack = ExitStack()
    stack.callback(register_optimizer_step_pre_hook(before).remove)
    stack.callback(register_optimizer_step_post_hook(after).remove)
    return stack


def _tensors(tree: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in tree_leaves([dict(part) for part in tree]) if isinstance(leaf, Tensor))


def _is_host(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"
