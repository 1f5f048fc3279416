"""The blocks of a network in the order in which they run, and its cuts, whatever its kind: the U's layers by the names
of the paper, a transformer's blocks by their numbers."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from ..lora.dialects import outlined
from ..nets.families import family_in
from ..nets.network import Cut
from ..nets.transformer import Transformer
from ..nets.unet_layers import Config, Layer, hollowed_layers, layers, max_cut


class Block(NamedTuple):
    """Of a network."""

    name: str
    """ "3-2" or "17"."""
    slot: str
    """As other tools' users know it, "IN08"; "" of a transformer's."""
    kind: str
    """As `unet_layers.Layer` has it; "block" of a transformer's."""
    modules: tuple[str, ...]
    """By diffusers' names."""

    @property
    def label(self) -> str:
        """ "IN08 = 3-2" or "17"."""
        return f"{self.slot} = {self.name}" if self.slot else self.name


def slot(layer: Layer) -> str:
    """ "IN08", "MID" or "OUT03"; an upsampler shares that of the layer before it."""
    side, index, *_ = layer.ldm[0].split(".")
    return "MID" if side == "middle_block" else f"{'IN' if side == 'input_blocks' else 'OUT'}{int(index):02}"


def blocks(config: Config) -> list[Block]:
    """All of them."""
    if family_in(config) is None:
        return [Block(layer.name, slot(layer), layer.kind, layer.modules) for layer in layers(config)]
    network = _transformer(json.dumps(dict(config)))
    paths = [
        f"{listed.path}.{name}"
        for listed in network.family.blocks
        for name, _ in network.module.get_submodule(listed.path).named_children()
    ]
    return [Block(str(number), "", "block", (path,)) for number, path in enumerate(paths)]


def hollowed(config: Config, cut: Cut) -> list[Block]:
    """Those that a cut takes out. Raises HollowError for one that the network has not."""
    if isinstance(cut, int) and family_in(config) is None:
        gone = {layer.name for layer in hollowed_layers(config, cut)}
        return [block for block in blocks(config) if block.name in gone]
    paths = set(_transformer(json.dumps(dict(config))).blocks(cut))
    return [block for block in blocks(config) if paths & set(block.modules)]


def cuts(config: Config) -> Sequence[Cut]:
    """From the least on; of a transformer those of both ends evenly."""
    if family_in(config) is None:
        return range(max_cut(config) + 1)
    return _transformer(json.dumps(dict(config))).cuts()


@lru_cache(maxsize=4)
def _transformer(config: str) -> Transformer:
    return Transformer(outlined(json.loads(config)))
