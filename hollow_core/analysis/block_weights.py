"""The blocks by the names that other tools' users know, their strings of weights, and scaling a LoRA by them.

IN00 … MID … OUT11 are the positions in an original checkpoint. A string "1,0,0.5,…" (sd-webui-lora-block-weight's)
has one number a slot: the first, BASE, is the text encoder's, then come the positions that LoRA usually has, which
are those with attention (17 numbers for SD, 12 for SDXL), or all of them (26, 20). For transformers
there is no such custom: their blocks are named by their numbers, "12=0.5".
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..errors import HollowError
from ..lora.delta import LoraLayer
from ..lora.dialects import called_in
from ..lora.file import Written, config_of, kind_of, read_whole, write_dialect
from ..lora.metadata import describe_converted
from ..nets.families import family_in
from ..nets.unet_layers import Config, layers
from .blocks import Block, blocks, slot

# What has a slot without being one of the U's layers.
_OUTSIDE = {"text_encoder": "BASE", "text_encoder_2": "BASE", "conv_in": "IN00"}


def slots(config: Config, *, all_blocks: bool = False) -> list[str]:
    """What the numbers of a string of block weights stand for, after BASE."""
    known = [layer for layer in layers(config) if all_blocks or layer.kind == "RA"]
    return list(dict.fromkeys((["IN00"] if all_blocks else []) + [slot(layer) for layer in known]))


def block_weights(config: Config, factors: Mapping[str, float], *, all_blocks: bool = False) -> str:
    """The string for `factors`, {slot: number}; what they do not name, BASE among it, is 1."""
    return ",".join(f"{factors.get(name, 1.0):g}" for name in ["BASE", *slots(config, all_blocks=all_blocks)])


def without(config: Config, gone: Sequence[Block], *, all_blocks: bool = False) -> str:
    """Block weights that switch these blocks off."""
    if family_in(config) is not None:
        return ",".join(f"{block.name}=0" for block in gone)
    return block_weights(config, {block.slot: 0.0 for block in gone}, all_blocks=all_blocks)


def parse_block_weights(text: str, config: Config) -> dict[str, float]:
    """{beginning of module names: factor} of "1,0,0.5,…", or of "IN08=0.5, 3-2=0, up_blocks.3=2".

    The second kind names slots, the paper's layers, a transformer's blocks by number or diffusers' modules; of two that
    name the same module, the later holds. Raises HollowError for a string of another length, an unknown name and what
    is no number.
    """
    parts = [part for part in re.split(r"[\s,]+", re.sub(r"\s*=\s*", "=", text)) if part]
    if parts and all("=" in part for part in parts):
        pairs = [(name, _number(value)) for name, _, value in (part.partition("=") for part in parts)]
    elif family_in(config) is not None:
        raise HollowError(f"{text!r} names no block of {called_in(config)}. Name them by number, as in 12=0.5.")
    else:
        numbered = [["BASE", *slots(config, all_blocks=all_blocks)] for all_blocks in (False, True)]
        names = next((names for names in numbered if len(names) == len(parts)), None)
        if names is None:
            short, long = map(len, numbered)
            raise HollowError(
                f"{text!r} are no block weights for this U-Net. Write {short} or {long} numbers with commas between "
                "them, or name blocks, as in IN08=0.5."
            )
        pairs = list(zip(names, map(_number, parts), strict=True))
    factors: dict[str, float] = {}
    for name, factor in pairs:
        for module in _modules(name, config):
            factors.pop(module, None)  # the later one comes last
            factors[module] = factor
    return factors


def factor_of(module: str, factors: Mapping[str, float]) -> float:
    """What a module is multiplied by: 1 unless `factors`, as `parse_block_weights` gives them, name it."""
    return next((factors[name] for name in reversed(list(factors)) if f"{module}.".startswith(f"{name}.")), 1.0)


def scale(lora: Mapping[str, LoraLayer], factors: Mapping[str, float]) -> dict[str, LoraLayer]:
    """The LoRA with ΔW of each module multiplied by its factor; `up` takes it, in fp32.

    Raises HollowError where a factor meets DoRA's magnitudes, to which ΔW is not proportional.
    """
    scaled = dict(lora)
    for module, layer in lora.items():
        factor = factor_of(module, factors)
        if factor == 1:
            continue
        if layer.dora_scale is not None:
            raise HollowError(f"{module} is a DoRA, whose change is not scaled by a number. Leave its block at 1.")
        scaled[module] = layer._replace(up=layer.up.float() * factor)
    return scaled


def scale_file(
    source: Path,
    target: Path,
    text: str,
    *,
    config: Config | None = None,
    unet_only: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Written:
    """Write the LoRA of a file, scaled as `text` says, in the dialect and with the metadata that it has.

    `unet_only` leaves out what is for text encoders, and embeddings. `config` is the network's, needed where it is that
    of no public model. Raises HollowError as `read_whole`, `parse_block_weights`, `scale` and `write_dialect` do.
    """
    lora, metadata = read_whole(source, config, unet_only=unet_only)
    config = config or config_of(metadata, lora.shapes)
    factors = parse_block_weights(text, config)
    scaled = lora._replace(layers=scale(lora.layers, factors), text=scale(lora.text, factors))
    described = describe_converted(metadata, target.stem, kind_of(config))
    return write_dialect(target, scaled, config, described, dialect=lora.dialect, dtype=dtype)


def _modules(name: str, config: Config) -> Sequence[str]:
    known = blocks(config)
    upper = re.sub(r"^(IN|OUT)(\d)$", r"\g<1>0\2", name.upper().replace("M00", "MID"))
    found = [
        module for layer in known if name == layer.name or upper == (layer.slot or None) for module in layer.modules
    ]
    found += [module for module, there in _OUTSIDE.items() if there == upper]
    if not found and any(f"{module}.".startswith(f"{name}.") for layer in known for module in layer.modules):
        found = [name]
    if not found:
        transformer = family_in(config) is not None
        names = f"12 or {known[-1].modules[0]}" if transformer else "IN08, 3-2 or down_blocks.2.attentions.1"
        raise HollowError(f"{called_in(config).replace('this', 'This')} has no block {name!r}. Name it as {names}.")
    return found


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not abs(number) < float("inf"):
        raise HollowError(f"{text!r} is no number to multiply a block by. Write one such as 0.5.")
    return number
