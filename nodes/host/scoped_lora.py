"""A LoRA on ComfyUI's U-Net that takes effect within a `with` only, and row by row if need be.

Weights stay as they are: while it is on, a layer's forward adds what the LoRA computes from the same input. So it
fits weights of any storage type, wherever ComfyUI keeps them, and under patches of other nodes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.nn import functional as F

from ...hollow_core.errors import HollowError
from ...hollow_core.lora.file import alpha_of

_DOWN, _UP, _ALPHA, _MAGNITUDES = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"
_ADVICE = "Use it with the kind of model on which it was trained."


class LoraLayer(NamedTuple):
    """What the LoRA adds to one Linear or Conv2d: scale · up(down(x)), and a DoRA's stretch of what that makes."""

    path: str
    """Of the layer, from the U-Net: "input_blocks.4.1.proj_in"."""
    down: Tensor  # (rank, in) or (rank, in, height, width)
    up: Tensor  # (out, rank) or (out, rank, 1, 1)
    scale: float  # alpha / rank
    stretch: Tensor | None = None
    """(out,) or (out, 1, 1): by how much DoRA makes each output longer, 0 for not at all; or each input."""
    by_input: bool = False
    """Whether `stretch` is of inputs."""


def lora_layers(model: ModelPatcher, state: Mapping[str, Tensor]) -> list[LoraLayer]:
    """The layers of a LoRA in kohya's spelling (as in `HollowLora.state`) for the MODEL's U-Net.

    Raises HollowError, naming the first key, where it is no plain LoRA or does not fit this U-Net.
    """
    unet, paths = model.model.diffusion_model, comfy.lora.model_lora_keys_unet(model.model, {})
    for key in state:
        if key.partition(".")[2] not in (_DOWN, _UP, _ALPHA, _MAGNITUDES):
            raise HollowError(f"This is no plain LoRA: it holds {key}. Choose one that Hollow has trained.")
    return [_layer(unet, paths, name, state) for name in dict.fromkeys(key.partition(".")[0] for key in state)]


def _layer(unet: Any, paths: Mapping[str, str], name: str, state: Mapping[str, Tensor]) -> LoraLayer:
    if name not in paths:
        raise HollowError(f"The LoRA changes {name}, which this MODEL has not. {_ADVICE}")
    path = paths[name].removeprefix("diffusion_model.").removesuffix(".weight")
    down, up = state.get(f"{name}.{_DOWN}"), state.get(f"{name}.{_UP}")
    if down is None or up is None:
        raise HollowError(f"The LoRA has only one of two matrices for {name}. Get or make the file again.")
    weight = unet.get_submodule(path).weight
    needed = (len(down), *weight.shape[1:]), (len(weight), len(down), *[1] * (weight.dim() - 2))
    if (tuple(down.shape), tuple(up.shape)) != needed:
        raise HollowError(
            f"The LoRA for {name} has shapes {tuple(down.shape)} and {tuple(up.shape)}, but this MODEL needs "
            f"{needed[0]} and {needed[1]}. {_ADVICE}"
        )
    scale = alpha_of(state, name, len(down)) / len(down)
    magnitudes = state.get(f"{name}.{_MAGNITUDES}")
    if magnitudes is None:
        return LoraLayer(path, down, up, scale)
    by_input = len(magnitudes) != len(weight)  # of shape (1, in, …), else (out, 1, …)
    return LoraLayer(
        path, down, up, scale, _stretch(name, magnitudes, weight, scale, down, up, by_input=by_input), by_input
    )


def _stretch(
    name: str, magnitudes: Tensor, weight: Tensor, scale: float, down: Tensor, up: Tensor, *, by_input: bool
) -> Tensor:
    """m / ‖W + ΔW‖ - 1 of each output, or input, W being the MODEL's own, without patches."""
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise HollowError(
            f"The LoRA is a DoRA, which needs the weights of this MODEL as they are, but they are in {weight.dtype}. "
            "Load the MODEL in fp16 or bf16."
        )
    needed = weight.shape[1] if by_input else len(weight)
    if magnitudes.numel() != needed:
        raise HollowError(f"The DoRA has {magnitudes.numel()} magnitudes for {name}, not {needed}. {_ADVICE}")
    changed = weight.detach().cpu().float().flatten(1) + scale * up.float().flatten(1) @ down.float().flatten(1)
    if by_input:
        changed = changed.view(weight.shape).transpose(0, 1).flatten(1)
    norms = torch.linalg.vector_norm(changed, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return (magnitudes.float().flatten() / norms - 1).view(-1, *[1] * (weight.dim() - 2))


class ScopedLora:
    """LoRA layers for the time of one run, in which their matrices stay on the devices where they are used."""

    def __init__(self, layers: Sequence[LoraLayer], strength: float) -> None:
        self.layers, self.strength = layers, strength
        self._matrices: dict[tuple[str, torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor | None]] = {}

    @contextmanager
    def on(self, unet: nn.Module, rows: Tensor | None = None) -> Iterator[None]:
        """While inside, `unet` computes with the LoRA; `rows` (batch,) scales it for each row, None is 1 for all."""
        before: dict[nn.Module, Any] = {}
        try:
            for layer in self.layers:
                module = unet.get_submodule(layer.path)
                own = vars(module).get("forward")  # another extension's
                module.forward = self._with_lora(layer, module, module.forward, rows)
                before[module] = own
            yield
        finally:
            for module, own in before.items():
                if own is None:
                    del module.forward
                else:
                    module.forward = own

    def _with_lora(
        self, layer: LoraLayer, module: Any, forward: Callable[..., Tensor], rows: Tensor | None
    ) -> Callable[..., Tensor]:
        def with_lora(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            down, up, stretch = self._on_device(layer, x)
            unchanged = forward(x, *args, **kwargs)
            more = x * stretch if stretch is not None and layer.by_input else None
            learned = x if more is None else x + more
            if isinstance(module, nn.Conv2d):
                added = F.conv2d(module._conv_forward(learned, down, None), up)  # stride and padding are the layer's
            else:
                added = F.linear(F.linear(learned, down), up)
            scale = layer.scale
            if stretch is not None:
                added, scale = added * scale, 1.0
                changed = unchanged + added if more is None else forward(more, *args, **kwargs)
                if module.bias is not None:
                    by_output = (-1, 1, 1) if isinstance(module, nn.Conv2d) else (-1,)
                    changed = changed - module.bias.to(x).view(by_output)
                added = torch.addcmul(added, changed, stretch) if more is None else added + changed
            if rows is not None:  # patches may have cut the pictures of a batch into tiles
                of_each = rows.repeat_interleave(len(added) // len(rows))
                added = added * of_each.view(-1, *[1] * (added.dim() - 1))
            return torch.add(unchanged, added, alpha=self.strength * scale)

        return with_lora

    def _on_device(self, layer: LoraLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        key = layer.path, x.device, x.dtype
        if key not in self._matrices:
            stretch = None if layer.stretch is None else layer.stretch.to(x.device, x.dtype)
            self._matrices[key] = layer.down.to(x.device, x.dtype), layer.up.to(x.device, x.dtype), stretch
        return self._matrices[key]
