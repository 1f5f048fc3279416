"""The two paths through ComfyUI's U-Net: up to the exit of a cut, and from there without the middle.

Both run ComfyUI's own forward on the model itself, from which some blocks are taken out for the time of the call.
Blocks are counted as ComfyUI counts them: of n input blocks a cut k hollows the last k, of n output blocks the
first k; the exit is the input of output block k.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential, UNetModel
from torch import Tensor, nn

Control = Mapping[str, list[Tensor | None]]
Patch = Callable[..., Any]


class Inputs(NamedTuple):
    """The arguments of `UNetModel.forward`, in its order."""

    x: Tensor  # (batch, channels, height, width)
    timesteps: Tensor  # (batch,)
    context: Tensor  # (batch, tokens, width)
    y: Tensor | None  # (batch, adm channels)
    control: Control | None
    transformer_options: dict[str, Any]


def max_cut(unet: UNetModel) -> int:
    """The largest cut: one input and one output block remain."""
    return len(unet.output_blocks) - 1


def run_to_exit(executor: Any, cut: int, inputs: Inputs, **kwargs: Any) -> Tensor:
    """The exit activation (batch, channels, h, w). `executor` is a DIFFUSION_MODEL wrapper's."""
    unet = executor.class_obj
    # The lists of `control` are popped from, and the options written to, so this path has its own.
    control = inputs.control and {kind: list(values) for kind, values in inputs.control.items()}
    own = inputs._replace(control=control, transformer_options=dict(inputs.transformer_options))
    with _replaced(unet, output_blocks=unet.output_blocks[:cut], out=nn.Identity()):
        return executor(*own, **kwargs)


def run_from_exit(executor: Any, cut: int, exit_activation: Tensor, inputs: Inputs, **kwargs: Any) -> Tensor:
    """The prediction (batch, channels, height, width) of the hollowed U-Net, which may write to `exit_activation`.

    Patches and ControlNet residuals act on the blocks that remain, under the numbers that they have in the whole.
    """
    unet = executor.class_obj
    own = inputs._replace(
        control=_for_the_rest(inputs.control, cut, len(unet.input_blocks)),
        transformer_options=_handing_in(exit_activation, unet, cut, inputs.transformer_options),
    )
    nothing = TimestepEmbedSequential()
    rest = len(unet.input_blocks) - cut
    hollowed: dict[str, nn.Module] = {
        "input_blocks": nn.ModuleList([*unet.input_blocks[:rest], *[nothing] * cut]),
        "output_blocks": nn.ModuleList([*[nothing] * cut, *unet.output_blocks[cut:]]),
    }
    if unet.middle_block is not None:
        hollowed["middle_block"] = nothing
    with _replaced(unet, **hollowed):
        return executor(*own, **kwargs)


@contextmanager
def _replaced(unet: UNetModel, **modules: nn.Module) -> Iterator[None]:
    before = {name: getattr(unet, name) for name in modules}
    try:
        for name, module in modules.items():
            setattr(unet, name, module)
        yield
    finally:
        for name, module in before.items():
            setattr(unet, name, module)


def _for_the_rest(control: Control | None, cut: int, blocks: int) -> Control | None:
    """Control without residuals for hollowed blocks, where they have had their effect in the exit activation."""
    hollowed = {"input": range(blocks - cut, blocks), "middle": range(1), "output": range(cut)}

    def remaining(kind: str, values: list[Tensor | None]) -> list[Tensor | None]:
        blocks = reversed(range(len(values)))  # they take their values from the end
        return [None if i in hollowed.get(kind, ()) else value for i, value in zip(blocks, values, strict=True)]

    return control and {kind: remaining(kind, values) for kind, values in control.items()}


def _handing_in(exit_activation: Tensor, unet: UNetModel, cut: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Transformer options under which the exit activation comes in at output block `cut`."""
    rest = len(unet.input_blocks) - cut
    middle = [] if unet.middle_block is None else [unet.middle_block]
    gone = [*unet.input_blocks[rest:], *middle, *unet.output_blocks[:cut]]
    transformers_gone = sum(isinstance(layer, SpatialTransformer) for block in gone for layer in block)

    def hand_in(h: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        _, block = options["block"]
        if block < cut:
            return h, skip[:, :0]  # or the activations, which nothing consumes, would grow from block to block
        if block == cut:
            options["transformer_index"] += transformers_gone
            return exit_activation, skip
        return h, skip

    patches = dict(options.get("patches", {}))
    patches.pop("middle_block_after_patch", None)  # of newer versions
    for kind in ("input_block_patch", "input_block_patch_after_skip"):
        if kind in patches:
            patches[kind] = [_from_block(0, rest, patch) for patch in patches[kind]]
    remaining = [_from_block(cut, len(unet.output_blocks), patch) for patch in patches.get("output_block_patch", [])]
    patches["output_block_patch"] = [hand_in, *remaining]
    return {**options, "patches": patches}


def _from_block(first: int, end: int, patch: Patch) -> Patch:
    """`patch` on the blocks `first` to `end` only: FreeU for one writes in place, and an empty block hands on the
    very tensor that a block which remains will use."""

    def patch_if_there(*args: Any) -> Any:  # (h, options) -> h, or (h, skip, options) -> (h, skip)
        *hidden, options = args
        if first <= options["block"][1] < end:
            return patch(*args)
        return hidden[0] if len(hidden) == 1 else tuple(hidden)

    return patch_if_there
