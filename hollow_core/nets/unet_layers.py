"""The map of a U-Net: its layers by the names of the paper, diffusers and LDM, and what a cut removes.

Everything is derived from the U-Net's config. Any `UNet2DConditionModel` of plain and cross-attention blocks
has such a map; a *cut* k takes the mid block and, on either side of it, the k nearest skip connections with
the layers that make and use them (Hollowed Net, section 4.2 and appendix B).
"""

from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import HollowError

if TYPE_CHECKING:  # it needs torch, and this file does not
    from .network import Cut

Config = Mapping[str, Any]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The paper's targets of a LoRA: the four projections of self- and cross-attention."""

ALL_LAYERS = (*ATTENTION, "conv1", "conv2", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
"""Convolutions and feed-forward too: more is learned in fewer steps, in a file several times as large."""


class Layer(NamedTuple):
    """One step of the U: a ResNet, a ResNet with its attention, a downsampler or an upsampler."""

    name: str  # the paper's: "3-2" is the second layer of the third block, counted along the U
    side: Literal["down", "mid", "up"]
    kind: Literal["R", "RA", "downsampler", "upsampler"]
    modules: tuple[str, ...]  # diffusers: ("down_blocks.2.resnets.1", "down_blocks.2.attentions.1")
    ldm: tuple[str, ...]  # the same in an original checkpoint: ("input_blocks.8.0", "input_blocks.8.1")
    channels: int  # of its output


def check_config(config: Config) -> None:
    """Raises HollowError unless a U-Net is of the kind of Stable Diffusion 1, 2 and XL: of blocks that have a map, it
    sees a time step, a prompt and at most what SDXL is told, and gives what it takes. What a config leaves out is as
    diffusers has it."""
    _check_blocks(config)
    inside, outside = config.get("in_channels", 4), config.get("out_channels", 4)
    if inside != outside:
        raise HollowError(
            f"This U-Net takes {inside} channels and gives {outside}. Use a model that is not for inpainting, edits or "
            "the like."
        )
    for key, (known, meaning) in _KNOWN_VALUES.items():
        if (value := config.get(key) or known[0]) not in known:
            raise HollowError(f"This U-Net has {key} {value!r}, for {meaning}. {_PLAIN}")
    if not isinstance(width := config.get("cross_attention_dim", 1280), int):
        raise HollowError(f"This U-Net has cross_attention_dim {width}, but prompts have one width. {_PLAIN}")
    if config.get("addition_embed_type") == "text_time":
        told, size = (config.get(key) for key in ("projection_class_embeddings_input_dim", "addition_time_embed_dim"))
        if not (isinstance(told, int) and isinstance(size, int) and told > 6 * size):
            raise HollowError(
                f"This U-Net is told {told} numbers, of which six sizes would take {size} each, as in SDXL. {_PLAIN}"
            )


_PLAIN = "Take the plain model of SD 1.x, SD 2.x or SDXL that it was made from."
_KNOWN_VALUES: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "time_cond_proj_dim": ((None,), "the scale of guidance, as LCM is told it"),
    "class_embed_type": ((None,), "classes or pictures"),
    "num_class_embeds": ((None,), "classes or noise levels, as upscalers are told them"),
    "class_embeddings_concat": ((False,), "classes"),
    "addition_embed_type": ((None, "text_time"), "more than SDXL is told"),
    "encoder_hid_dim_type": ((None,), "prompts of another encoder, or pictures as IP-Adapter's"),
    "encoder_hid_dim": ((None,), "prompts of another encoder"),
    "attention_type": (("default",), "boxes, as GLIGEN is told them"),
    "dual_cross_attention": ((False,), "two prompts"),
}
"""By the names of diffusers' config, the usual value first; another needs what training, drawing or files have not."""


def layers(config: Config) -> list[Layer]:
    """The layers of a U-Net in the order in which they run, without conv_in and conv_out.

    Raises HollowError for blocks other than the plain and the cross-attention ones.
    """
    _check_blocks(config)
    return [*_down_layers(config), *_mid_layers(config), *_up_layers(config)]


def max_cut(config: Config) -> int:
    """The largest cut (11 for SD, 8 for SDXL): no down layer is left, only conv_in and the last up layer."""
    return sum(layer.side == "down" for layer in layers(config))


def check_cut(config: Config, cut: "Cut") -> int:
    """The cut. Raises HollowError unless it is a number, and 0 <= cut <= max_cut(config)."""
    if isinstance(cut, tuple):
        raise HollowError(
            f"A U-Net is cut in its middle, but {cut[0]},{cut[1]} is a cut of both ends. Choose one number, from 0 to "
            f"{max_cut(config)}."
        )
    if not 0 <= cut <= max_cut(config):
        raise HollowError(f"This U-Net has no cut {cut}. Choose a cut from 0 to {max_cut(config)}.")
    return cut


def hollowed_layers(config: Config, cut: "Cut") -> list[Layer]:
    """What cut k removes, in the order in which it runs: the last k down layers, the mid block, the first k
    up layers with a ResNet and any upsampler between or directly behind them.

    Raises HollowError for a cut out of range.
    """
    cut = check_cut(config, cut)
    all_layers = layers(config)
    down = [layer for layer in all_layers if layer.side == "down"]
    mid = [layer for layer in all_layers if layer.side == "mid"]
    skips_left = cut

    def is_hollowed(layer: Layer) -> bool:
        nonlocal skips_left
        skips_left -= layer.kind != "upsampler"
        return skips_left >= 0

    up = takewhile(is_hollowed, (layer for layer in all_layers if layer.side == "up"))
    return [*down[len(down) - cut :], *mid, *up]


def leaves_attention(config: Config, cut: "Cut") -> bool:
    """Whether a U-Net hollowed at the cut still has attention, where a LoRA usually is."""
    hollowed = hollowed_layers(config, cut)
    return any(layer.kind == "RA" and layer not in hollowed for layer in layers(config))


def exit_shape(config: Config, cut: "Cut", height: int, width: int) -> tuple[int, int, int]:
    """(channels, height, width) of the exit activation for latents of height × width.

    It is what the last hollowed layer puts out, as large as the last skip connection that remains.
    """
    hollowed = hollowed_layers(config, cut)
    remaining = set(layers(config)) - set(hollowed)
    padding = 2 if config.get("downsample_padding", 1) == 1 else 1
    for _ in (layer for layer in remaining if layer.kind == "downsampler"):
        height, width = ((size + padding - 3) // 2 + 1 for size in (height, width))
    return hollowed[-1].channels, height, width


def to_ldm(config: Config, path: str) -> str:
    """The name that a diffusers module or parameter has in an original (LDM) checkpoint.

    Raises HollowError for a path that this U-Net has not.
    """
    return _rename(path, dict(_renamings(config)))


def from_ldm(config: Config, path: str) -> str:
    """The inverse of `to_ldm`; `path` comes without "model.diffusion_model."."""
    return _rename(path, {ldm: diffusers for diffusers, ldm in _renamings(config)})


_KNOWN_BLOCKS = (
    "DownBlock2D",
    "CrossAttnDownBlock2D",
    "UNetMidBlock2DCrossAttn",
    "UpBlock2D",
    "CrossAttnUpBlock2D",
)


def _check_blocks(config: Config) -> None:
    mid = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    for block in [*config.get("down_block_types", ()), mid, *config.get("up_block_types", ())]:
        if block not in _KNOWN_BLOCKS:
            what = f"a {block}" if block else "no middle"
            raise HollowError(f"Hollow cannot cut a U-Net with {what}. It knows {', '.join(_KNOWN_BLOCKS)}.")


def _layers_per_block(config: Config) -> list[int]:
    count = config["layers_per_block"]
    return [count] * len(config["down_block_types"]) if isinstance(count, int) else list(count)


def _down_layers(config: Config) -> Iterator[Layer]:
    index = 1  # input_blocks.0 is conv_in
    blocks, channels = config["down_block_types"], config["block_out_channels"]
    for level, count in enumerate(_layers_per_block(config)):
        path = f"down_blocks.{level}"
        for i in range(count):
            name, ldm = f"{level + 1}-{i + 1}", f"input_blocks.{index}"
            yield _resnet_layer(name, "down", blocks[level], path, i, ldm, channels[level])
            index += 1
        if level < len(blocks) - 1:
            name, module, ldm = (
                f"{level + 1}-{count + 1}",
                f"{path}.downsamplers.0",
                f"input_blocks.{index}.0",
            )
            yield Layer(name, "down", "downsampler", (module,), (ldm,), channels[level])
            index += 1


def _mid_layers(config: Config) -> Iterator[Layer]:
    number, channels = len(config["down_block_types"]) + 1, config["block_out_channels"][-1]
    modules, ldm = ("mid_block.resnets.0", "mid_block.attentions.0"), ("middle_block.0", "middle_block.1")
    yield Layer(f"{number}-1", "mid", "RA", modules, ldm, channels)
    yield Layer(f"{number}-2", "mid", "R", ("mid_block.resnets.1",), ("middle_block.2",), channels)


def _up_layers(config: Config) -> Iterator[Layer]:
    index = 0
    blocks, channels = config["up_block_types"], config["block_out_channels"][::-1]
    for level, count in enumerate(reversed(_layers_per_block(config))):
        path, number = f"up_blocks.{level}", len(blocks) + 2 + level
        for i in range(count + 1):
            name, ldm = f"{number}-{i + 1}", f"output_blocks.{index}"
            layer = _resnet_layer(name, "up", blocks[level], path, i, ldm, channels[level])
            yield layer
            index += 1
        if level < len(blocks) - 1:  # LDM lists an upsampler behind the modules of its block's last layer
            name, module = f"{number}-{count + 2}", f"{path}.upsamplers.0"
            ldm = f"output_blocks.{index - 1}.{len(layer.modules)}"
            yield Layer(name, "up", "upsampler", (module,), (ldm,), channels[level])


def _resnet_layer(
    name: str, side: Literal["down", "up"], block: str, path: str, i: int, ldm: str, channels: int
) -> Layer:
    resnet, attention = f"{path}.resnets.{i}", f"{path}.attentions.{i}"
    if block.startswith("CrossAttn"):
        return Layer(name, side, "RA", (resnet, attention), (f"{ldm}.0", f"{ldm}.1"), channels)
    return Layer(name, side, "R", (resnet,), (f"{ldm}.0",), channels)


# Attention has the same names on both sides.
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE_THE_LAYERS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _renamings(config: Config) -> Iterator[tuple[str, str]]:
    yield from _OUTSIDE_THE_LAYERS.items()
    for layer in layers(config):
        for module, ldm in zip(layer.modules, layer.ldm, strict=True):
            yield module, ldm
            if ".resnets." in module:
                yield from ((f"{module}.{inner}", f"{ldm}.{_RESNET[inner]}") for inner in _RESNET)
            elif layer.kind == "downsampler":
                yield f"{module}.conv", f"{ldm}.op"


def _rename(path: str, names: Mapping[str, str]) -> str:
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in names:
            return ".".join([names[prefix], *parts[length:]])
    raise HollowError(f"This U-Net has no layer {path!r}. Check that the file belongs to this kind of model.")
