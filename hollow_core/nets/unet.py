"""A U-Net as a `Network`: without its middle, and the path to its exit, views that share every layer with the base.

A view is a shallow copy of the U-Net and of those containers whose content differs; all else is the same
object. So no weight is copied, a submodule keeps the name that it has in the whole U-Net, and LoRA layers put
into one view show in the others. (A LoRA on conv_in or conv_out, which hang on the U-Net itself, shows only
in views made afterwards.)
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..errors import HollowError
from .conditioning import Conditioning
from .network import Cut, Stored, Targets, removed_fraction
from .transfer import send
from .unet_layers import (
    ALL_LAYERS,
    ATTENTION,
    check_cut,
    exit_shape,
    hollowed_layers,
    layers,
    leaves_attention,
    max_cut,
)

EXIT_ACTIVATION = ""
"""What a U-Net's record keeps, its only tensor: so it needs no name, and stands in stores under the record's number."""

TOKENS = 77
"""The length of CLIP's prompts."""


@dataclass(frozen=True)
class UNet:
    """A `Network` of the kind of Stable Diffusion 1, 2 and XL. Its cuts are the paper's k."""

    module: UNet2DConditionModel
    """Whole, or as `hollow` gives it."""

    @property
    def cut(self) -> Cut | None:
        """At which it was hollowed; None while it is whole."""
        return self.module.cut if isinstance(self.module, HollowedUNet) else None

    @property
    def config(self) -> Mapping[str, Any]:
        """As diffusers writes it."""
        return cast(Mapping[str, Any], self.module.config)

    @property
    def dtype(self) -> torch.dtype:
        """Of its arithmetic."""
        return self._weight.dtype

    @property
    def within(self) -> tuple[str, ...]:
        """Anywhere."""
        return ("",)

    @property
    def targets(self) -> Targets:
        """The paper's, and all."""
        return Targets(ATTENTION, ALL_LAYERS)

    @property
    def kept(self) -> tuple[str, ...]:
        """They are under one percent, and what they make goes everywhere; device and dtype are read off conv_in."""
        return "conv_in", "conv_out", "time_embedding", "add_embedding"

    @property
    def record_dtype(self) -> torch.dtype:
        """Half the bytes of float32, and more exact than bfloat16."""
        return torch.float16

    @property
    def usual_cut(self) -> int:
        """The paper's."""
        return 3

    @property
    def token_side(self) -> None:
        """Convolutions have no position codes; what SDXL is told of crops is in its prompts."""
        return None

    @property
    def levels(self) -> int:
        """Of the U."""
        return len(self.config["block_out_channels"])

    def check_inputs(self, name: str, latents: Tensor, prompts: Sequence[Conditioning]) -> None:
        """Raises HollowError unless latents are (1, channels, height, width), and prompts as wide as they must be."""
        shape, channels = tuple(latents.shape), self.config["in_channels"]
        if len(shape) != 4 or shape[:2] != (1, channels):
            raise HollowError(
                f"The latents of {name} have shape {shape}, but this U-Net takes "
                f"(1, {channels}, height, width). Encode one picture at a time with the model's own VAE."
            )
        for conditioning in prompts:
            width, expected = conditioning.encoder_hidden_states.shape[-1], self.config["cross_attention_dim"]
            if isinstance(expected, int) and width != expected:
                raise HollowError(
                    f"The prompts of {name} are {width} wide, but this U-Net takes {expected}. "
                    "Use the model's own text encoder."
                )

    def cuts(self) -> range:
        """From the mid block alone to all but conv_in and the last up layer."""
        return range(max_cut(self.config) + 1)

    def nearest_cut(self, share: float) -> int:
        """Whose share of the parameters, from 0 to 1, comes nearest."""
        return min(self.cuts(), key=lambda cut: abs(removed_fraction(self, cut) - share))

    def check_cut(self, cut: Cut) -> None:
        """Raises HollowError for a cut that it has not."""
        check_cut(self.config, cut)

    def blocks(self, cut: Cut) -> list[str]:
        """By the paper's names."""
        return [layer.name for layer in hollowed_layers(self.config, cut)]

    def removed(self, cut: Cut) -> list[str]:
        """Paths of modules. The time-embedding MLP counts as removed: the time steps of training are known, so its
        outputs are precomputed. With it the seven percentages of the paper come out."""
        hollowed = hollowed_layers(self.config, cut)
        return [*(path for layer in hollowed for path in layer.modules), "time_embedding"]

    def behind(self, cut: Cut) -> list[str]:
        """Paths of modules: what remains on the way up."""
        hollowed = hollowed_layers(self.config, cut)
        up = (layer for layer in layers(self.config) if layer.side == "up" and layer not in hollowed)
        return [*(path for layer in up for path in layer.modules), "conv_out"]

    def leaves_attention(self, cut: Cut) -> bool:
        """Whether there is still attention, where a LoRA usually is."""
        return leaves_attention(self.config, cut)

    def stored_shapes(self, cut: Cut, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Of the exit activation, (channels, h, w), for latents of height × width."""
        return {EXIT_ACTIVATION: exit_shape(self.config, cut, height, width)}

    def inputs(self, height: int, width: int) -> tuple[Tensor, Conditioning]:
        """Latents (1, channels, height, width) and a prompt, of zeros."""
        config = self.module.config
        latents = torch.zeros(1, config.in_channels, height, width)
        prompt = torch.zeros(1, TOKENS, config.cross_attention_dim)
        if config.addition_embed_type is None:
            return latents, Conditioning(prompt)
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return latents, Conditioning(prompt, torch.zeros(1, pooled), torch.zeros(1, 6))

    def base(self, cut: Cut) -> "UNetBasePath":
        """Up to the exit. Raises HollowError for a cut out of range."""
        return UNetBasePath(head(self.module, cut))

    def hollow(self, cut: Cut, timesteps: Iterable[int] | None) -> "UNet":
        """As the function `hollow`."""
        return UNet(hollow(self.module, cut, timesteps))

    def predict(self, noisy: Tensor, timesteps: Sequence[int], conditioning: Conditioning, stored: Stored) -> Tensor:
        """What it makes of `noisy` latents (batch, channels, height, width); in float32. Raises HollowError for
        records that were made for a whole U-Net where this is hollowed, or the other way round."""
        if stored.keys() != (set() if self.cut is None else {EXIT_ACTIVATION}):
            raise HollowError(
                f"The records do not hold what a U-Net of cut {self.cut} needs (None: not hollowed). Precompute them "
                "for this cut and this kind of model."
            )
        device, dtype = self._weight.device, self._weight.dtype
        # a hollowed U-Net looks time steps up, which needs their numbers
        steps = send(torch.tensor(timesteps), device if self.cut is None else "cpu")
        handed_in = {} if self.cut is None else {"exit_activation": send(stored[EXIT_ACTIVATION], device, dtype)}
        prediction: Tensor = self.module(
            send(noisy, device, dtype), steps, **conditioning.to(device, dtype).kwargs(), **handed_in
        ).sample
        return prediction.float()

    def checkpoint(self, levels: int | None) -> None:
        """Let backward passes compute anew what blocks would keep, in so many levels from the outermost; None: all."""
        unet = self.module
        unet.enable_gradient_checkpointing()
        if levels is None:
            return
        down, up = list(unet.down_blocks), list(unet.up_blocks)
        inner = [*down[levels:], unet.mid_block, *up[: len(up) - levels]]
        for module in (module for block in inner if block is not None for module in block.modules()):
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False

    @property
    def _weight(self) -> Tensor:
        """Which stays as it is where others are quantised or streamed."""
        weight: Tensor = self.module.conv_in.weight
        return weight


@dataclass(frozen=True)
class UNetBasePath:
    """What `head` gives, as a `BasePath`."""

    module: UNet2DConditionModel

    @property
    def sees_identifier(self) -> bool:
        """It makes what any of the class has (Hollowed Net, Sec. 4.3)."""
        return False

    @torch.no_grad()
    def __call__(self, noisy: Tensor, timesteps: Sequence[int], conditioning: Conditioning) -> Stored:
        """The exit activations (batch, channels, h, w) for noisy latents (batch, channels, height, width)."""
        weight = self.module.conv_in.weight
        device, dtype = weight.device, weight.dtype
        steps, told = send(torch.tensor(timesteps), device), conditioning.to(device, dtype).kwargs()
        return {EXIT_ACTIVATION: self.module(send(noisy, device, dtype), steps, **told).sample}


class HollowedUNet(UNet2DConditionModel):
    """A U-Net that takes an exit activation in place of its middle. Made by `hollow`, never directly."""

    cut: Cut

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
        # row by row, as a list of rows would be sent to the device, and waited for
        return torch.stack([self.outputs[self.rows[timestep]] for timestep in timesteps])


def head(unet: UNet2DConditionModel, cut: Cut) -> UNet2DConditionModel:
    """The base path: a view of `unet` that stops at the exit of `cut`; its `.sample` is the exit activation
    (batch, channels, h, w) of `exit_shape`. Raises HollowError for a cut out of range."""
    hollowed = hollowed_layers(unet.config, cut)
    behind = [layer for layer in layers(unet.config) if layer.side == "up" and layer not in hollowed]
    view = _without(unet, {path for layer in behind for path in layer.modules})
    view._modules["up_blocks"] = nn.ModuleList([*view.up_blocks, _PassThrough()])
    view._modules["conv_norm_out"] = None
    view._modules["conv_out"] = nn.Identity()
    return view


def hollow(unet: UNet2DConditionModel, cut: Cut, timesteps: Iterable[int] | None = range(1000)) -> HollowedUNet:
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
