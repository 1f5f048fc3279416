"""A U-Net without its middle, and the path to its exit. Both are views: they share every layer with the base.

A view is a shallow copy of the U-Net and of those containers whose content differs; all else is the same
object. So no weight is copied, a submodule keeps the name that it has in the whole U-Net, and LoRA layers put
into one view show in the others. (A LoRA on conv_in or conv_out, which hang on the U-Net itself, shows only
in views made afterwards.)
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..errors import HollowError
from .unet_layers import exit_shape, hollowed_layers, layers


class HollowedUNet(UNet2DConditionModel):
    """A U-Net that takes an exit activation in place of its middle. Made by `hollow`, never directly."""

    cut: int

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *,
        exit_activation: Tensor,
        **kwargs: Any,
    ) -> Any:
        """`UNet2DConditionModel.forward` with `exit_activation` (batch, channels, h, w), of the sizes that
        `exit_shape` gives for `sample` (batch, channels, height, width).

        ControlNet residuals are added to the skip connections that remain; the others, and the mid residual,
        have had their effect in the exit activation. Raises HollowError for an activation of another shape,
        for a time step that was not precomputed, and for T2I-Adapter residuals.
        """
        expected = (sample.shape[0], *exit_shape(self.config, self.cut, *sample.shape[-2:]))
        if tuple(exit_activation.shape) != expected:
            raise HollowError(
                f"The exit activation has shape {tuple(exit_activation.shape)}, but cut {self.cut} needs "
                f"{expected}. Precompute it with the same cut and image size."
            )
        if kwargs.get("down_intrablock_additional_residuals") is not None:
            raise HollowError("A hollowed U-Net cannot take a T2I-Adapter. Use a ControlNet, or no cut.")
        if kwargs.get("down_block_additional_residuals") is not None:
            kwargs["mid_block_additional_residual"] = 0.0  # without any, diffusers takes it for a T2I-Adapter
        self.mid_block.exit_activation = exit_activation.to(sample.device, sample.dtype)
        try:
            return super().forward(sample, timestep, encoder_hidden_states, **kwargs)
        finally:
            self.mid_block.exit_activation = None

    def get_time_embed(self, sample: Tensor, timestep: Tensor | float) -> Any:
        """What `time_embedding` is given: for the MLP a sinusoid, for the table the time steps themselves."""
        if not isinstance(self.time_embedding, _TimeTable):
            return super().get_time_embed(
                sample, timestep.to(sample.device) if isinstance(timestep, Tensor) else timestep
            )
        return timestep.flatten().tolist() if isinstance(timestep, Tensor) else [timestep]


class _HandIn(nn.Module):
    """Stands where the mid block was and hands in the exit activation."""

    exit_activation: Tensor | None = None

    def forward(self, sample: Tensor, emb: Tensor) -> Tensor | None:
        return self.exit_activation


class _PassThrough(nn.Module):
    """A last up block that changes nothing.

    With it no real block is the last one, so an upsampler at the exit is told the size of the next skip
    connection, which odd latent sizes need.
    """

    def __init__(self) -> None:
        super().__init__()
        self.resnets = nn.ModuleList()

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


class _TimeTable(nn.Module):
    """The outputs of the time-embedding MLP, precomputed."""

    outputs: Tensor

    def __init__(self, unet: UNet2DConditionModel, timesteps: Iterable[int]) -> None:
        super().__init__()
        self.rows = {timestep: row for row, timestep in enumerate(dict.fromkeys(timesteps))}
        weight = next(unet.time_embedding.parameters())
        steps = torch.tensor(list(self.rows), device=weight.device)
        with torch.no_grad():
            outputs = unet.time_embedding(unet.time_proj(steps).to(weight.dtype))
        self.register_buffer("outputs", outputs, persistent=False)

    def forward(self, timesteps: list[int], condition: None = None) -> Tensor:
        missing = [timestep for timestep in timesteps if timestep not in self.rows]
        if missing:
            raise HollowError(
                f"Time step {missing[0]} was not precomputed for this hollowed U-Net. "
                "Name it when hollowing, or pass timesteps=None to keep the time-embedding MLP."
            )
        return self.outputs[[self.rows[timestep] for timestep in timesteps]]


def head(unet: UNet2DConditionModel, cut: int) -> UNet2DConditionModel:
    """The base path: a view of `unet` that stops at the exit of `cut`; its `.sample` is the exit activation
    (batch, channels, h, w) of `exit_shape`. Raises HollowError for a cut out of range."""
    hollowed = hollowed_layers(unet.config, cut)
    behind = [layer for layer in layers(unet.config) if layer.side == "up" and layer not in hollowed]
    view = _without(unet, {path for layer in behind for path in layer.modules})
    view._modules["up_blocks"] = nn.ModuleList([*view.up_blocks, _PassThrough()])
    view._modules["conv_norm_out"] = None
    view._modules["conv_out"] = nn.Identity()
    return view


def hollow(unet: UNet2DConditionModel, cut: int, timesteps: Iterable[int] | None = range(1000)) -> HollowedUNet:
    """The personal path: a view of `unet` without what `cut` removes. Delete `unet`, and the middle is freed.

    The outputs of the time-embedding MLP are precomputed for `timesteps` and the MLP is left out. None keeps
    it, for sampling, where the base is at hand and schedulers ask for fractional time steps. Raises
    HollowError for a cut out of range.
    """
    hollowed = hollowed_layers(unet.config, cut)
    view = _without(unet, {path for layer in hollowed for path in layer.modules if layer.side != "mid"})
    view.__class__ = HollowedUNet
    view.cut = cut
    view._modules["mid_block"] = _HandIn()
    if timesteps is not None:
        view._modules["time_embedding"] = _TimeTable(unet, timesteps)
    return view


def _without(module: nn.Module, gone: set[str], path: str = "") -> Any:
    """A view of `module` (at `path` of the whole) that lacks the submodules whose paths are `gone`."""
    view = copy.copy(module)
    view.__dict__.pop("forward", None)  # an offloading hook's wrapper, which would run the original
    view._modules = dict(module._modules)
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if child_path in gone:
            rest = None
        elif any(other.startswith(f"{child_path}.") for other in gone):
            rest = _without(child, gone, child_path)
            if path and not any(rest.children()):  # the U-Net's own lists of blocks may be empty, no other
                rest = None
        else:
            continue
        if rest is None and isinstance(module, nn.ModuleList):
            del view._modules[name]
        else:
            view._modules[name] = rest  # None: as diffusers writes a block that has no downsampler
    return view
