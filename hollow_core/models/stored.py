"""Weights as files store them: each as it is meant, whether scaled fp8 or under another version's name."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import HollowError
from ..files import damaged

_SCALES = (".scale_weight", ".weight_scale")
"""Beside the `weight` of a layer in scaled fp8: the older spelling and the newer one."""

_BESIDE = (*_SCALES, ".scale_input", ".input_scale", ".comfy_quant")
"""What files of scaled fp8 hold beside weights."""

_MARKER = "scaled_fp8"
"""An empty tensor that says so."""

_OTHERS = {
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".quant_state": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".qweight": "GPTQ, AWQ or SVDQuant",
    ".qzeros": "GPTQ or AWQ",
    ".weight_scale_2": "NVFP4",
    ".weight_scale_inv": "fp8 in blocks",
    "._data": "quanto",
}
"""Ends of the names that other ways of quantising leave."""

_CODES = {"I8", "U8", "I16", "U16", "I32", "U32", "F8_E8M0", "F4"}
"""What no weight that is meant as it stands is stored in."""


class StoredWeights(Mapping[str, Tensor]):
    """The weights in a .safetensors file by their names, each read when it is asked for.

    Codes of scaled fp8 come multiplied by their scales, which are not listed themselves. Of floats, each comes in
    `dtype`, None for as it is stored; with `outlined` as a tensor without data (on PyTorch's "meta" device).
    """

    def __init__(self, path: Path, dtype: torch.dtype | None = None, *, outlined: bool = False) -> None:
        """Reads the header alone. Raises HollowError for a file that is not whole, and for one that is quantised in any
        other way."""
        self.path, self.dtype, self.outlined = path, dtype, outlined
        try:
            self._file: Any = safe_open(path, "pt")
            self._stored = frozenset(self._file.keys())
            _check_plain(path, self._file, self._stored)
        except (OSError, SafetensorError) as error:
            raise damaged(path, error) from error
        self._names = [name for name in self._file.keys() if not _is_beside(name)]  # noqa: SIM118, no mapping

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._stored and not _is_beside(str(name))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        try:
            if self.outlined:
                shape = self._file.get_slice(name).get_shape()
                return torch.empty(shape, dtype=self.dtype or torch.float32, device="meta")
            stored: Tensor = self._file.get_tensor(name)
            if (scale := self._scale_of(name)) is not None:
                stored = stored.float() * self._along(self._file.get_tensor(scale).float(), stored, name)
        except SafetensorError as error:
            raise damaged(self.path, error) from error
        dtype = self.dtype if self.dtype is not None and stored.is_floating_point() else stored.dtype
        return stored.to(dtype, copy=True)  # memory of its own, aligned as PyTorch does: results hang on that

    def is_scaled(self, name: str) -> bool:
        """Whether what is stored under this name are codes of scaled fp8."""
        return self._scale_of(name) is not None

    def _scale_of(self, name: str) -> str | None:
        if not name.endswith(".weight"):
            return None
        layer = name.removesuffix(".weight")
        return next((f"{layer}{end}" for end in _SCALES if f"{layer}{end}" in self._stored), None)

    def _along(self, scale: Tensor, stored: Tensor, name: str) -> Tensor:
        """One for all, or one for each output."""
        if scale.numel() == 1:
            return scale.reshape(())
        if scale.numel() == len(stored):
            return scale.reshape(-1, *[1] * (stored.dim() - 1))
        raise HollowError(
            f"{self.path} scales {name}, which is {tuple(stored.shape)}, by {scale.numel()} numbers. Hollow knows one "
            "scale for a layer, or one for each of its outputs: get the model in plain weights."
        )


def quantised(path: Path, way: str) -> HollowError:
    """What is said of weights that were quantised on the disk."""
    return HollowError(
        f"{path} is quantised on disk ({way}), which Hollow does not read. Get the model in plain weights or scaled "
        "fp8; --base-bits 8 or 4 keeps those small while it runs."
    )


def filled(module: nn.Module, weights: Mapping[str, Tensor], path: Path, what: str = "") -> nn.Module:
    """A module, made without data, with these weights, which are not copied, and for evaluation.

    `what` names the part of the file at `path`, where it has several. Raises HollowError where weights are missing or
    of another shape.
    """
    wanted = module.state_dict()
    if missing := [name for name in wanted if name not in weights]:
        raise lacking(path, missing[0], what)
    found = {name: weights[name] for name in wanted}
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise _other_shape(path, what, name, tensor, wanted[name])
    module.load_state_dict(found, assign=True)
    return module.eval()


def lacking(path: Path, name: str, what: str = "") -> HollowError:
    """What is said of a part that is not whole."""
    of = f" of its {what}" if what else ""
    return HollowError(f"{path} lacks weights{of}, such as {name}. Get the full model.")


def clip_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a CLIP by the names of the module: before version 5 of transformers they begin with "text_model.", some
    merges leave that out, and version 5 has both."""
    known = module.state_dict()
    spellings = {name: (name, f"text_model.{name}", name.removeprefix("text_model.")) for name in known}
    found = {name: next((each for each in names if each in weights), None) for name, names in spellings.items()}
    return {name: weights[stored] for name, stored in found.items() if stored is not None}


def _is_beside(name: str) -> bool:
    return name.endswith(_BESIDE) or name.rpartition(".")[2] == _MARKER


def _check_plain(path: Path, file: Any, names: frozenset[str]) -> None:
    """Raises HollowError where weights are quantised in a way that is not read."""
    for name in sorted(names):
        way = next((way for end, way in _OTHERS.items() if name.endswith(end) or f"{end}." in name), None)
        if name.endswith(".comfy_quant"):
            told = _format(bytes(file.get_tensor(name).tolist()))
            way = None if told.startswith("float8") else told
        elif way is None and name.endswith(".weight") and file.get_slice(name).get_dtype() in _CODES:
            way = f"as {file.get_slice(name).get_dtype()}"
        if way is not None:
            raise quantised(path, way)


def _format(told: bytes) -> str:
    """Of ComfyUI's words on a layer."""
    try:
        return str(json.loads(told)["format"])
    except (ValueError, TypeError, KeyError):
        return "in a way that it does not tell"


def _other_shape(path: Path, what: str, name: str, found: Tensor, wanted: Tensor) -> HollowError:
    part = f"The {what} of {path}" if what else str(path)
    if name.endswith("token_embedding.weight") and found.shape[1:] == wanted.shape[1:]:
        return HollowError(
            f"{part} has {len(found)} tokens, not {len(wanted)} as its tokenizer and config: textual inversion leaves "
            "it so. Get all parts from the same model."
        )
    return HollowError(
        f"{part} is of another shape: its {name} is {_size(found)}, not {_size(wanted)}. Check that weights and "
        "configs belong together, and that it is a model of a public kind."
    )


def _size(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape))
