"""Counts what PyTorch is asked for, and where Python would wait for a GPU: in a dry run "meta" stands for one."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READ = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}
COPIES = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default}


class Dispatches(TorchDispatchMode):
    """`with DryRun(), Dispatches() as asked:` … then `asked.number` and `asked.waits`, in all or at some moment."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    @property
    def number(self) -> int:
        return self.ops.total()

    def counts(self) -> tuple[Counter[str], Counter[str]]:
        """`ops` and `waits` so far."""
        return self.ops.copy(), self.waits.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.ops[str(func)] += 1
        there = {tensor.is_meta for tensor in tree_leaves((args, kwargs, out)) if isinstance(tensor, torch.Tensor)}
        across = len(there) == 2
        if (
            (func in READ and True in there)
            or (func in COPIES and across and not _non_blocking(func, args, kwargs))
            or (func in INDEXED and across)
        ):
            self.waits[str(func)] += 1
        return out


def _non_blocking(func: Any, args: Any, kwargs: Any) -> bool:
    by_place = args[2:3] if func in (aten.copy_.default, aten._foreach_copy_.default) else ()
    return bool(kwargs.get("non_blocking") or any(by_place))
