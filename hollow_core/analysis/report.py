"""What is in a LoRA, or in several: by module, by block, by projection; and what looks wrong."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import HollowError
from ..lora.delta import LoraLayer
from ..lora.dialects import called_in, differences_in
from ..lora.file import config_of, differences, read, recipe_of
from ..lora.keys import in_words, of_text
from ..models.base_model import outline
from ..nets.families import family_in
from ..nets.network import Cut
from ..nets.unet_layers import Config, Layer
from .base_weights import BaseWeights, base_weights
from .block_weights import without
from .blocks import Block, blocks, cuts, hollowed
from .change import Change, measure, measure_difference, together

SMALL_SHARE = 0.1  # of all change: what a suggested cut may leave out
USUAL_SCALE = (1 / 256, 2.0)  # alpha / rank: kohya's alpha 1 at rank 256, and twice the rank
OUTLIER = 10  # times the median of the file
LARGEST = 1e18  # norm whose square fp32 still holds
_QKV = ("to_q", "to_k", "to_v", "to_out.0")


class Flag(NamedTuple):
    """Something about a module that a user should know."""

    module: str
    what: str


@dataclass(frozen=True)
class Analysis:
    """Of one LoRA."""

    name: str
    config: Config
    """The network's."""
    lora: Mapping[str, tuple[int, float]]
    """Rank and alpha of each module."""
    changes: Mapping[str, Change]
    """Of each module whose values can be measured."""
    flags: Sequence[Flag]
    cut: Cut | None = None
    """How much was hollowed when it was trained; None where nothing was, or where the file does not tell."""
    text_layers: int = 0
    """How many layers of text encoders the file has beside; they are not measured."""
    differences: int = 0
    """How many modules have the full difference of their weight in place of a LoRA, and are measured by that."""
    not_measured: Sequence[str] = ()
    """Keys of what else the file changes in the network: norms and biases, for example."""

    @property
    def besides(self) -> str:
        """What the file changes beside its LoRA, in sentences; "" for nothing."""
        said = []
        if self.differences:
            said.append(f"It holds full differences of {self.differences} weights, too, which are counted.")
        if self.not_measured:
            key = self.not_measured[0]
            what = f"{key}, {known}" if (known := in_words(key)) else key
            more = f", and {len(self.not_measured) - 1} more" if len(self.not_measured) > 1 else ""
            said.append(f"It also holds {what}{more}, which no figure here counts: they may be most of what it does.")
        return " ".join(said)

    def block(self, block: Block | Layer) -> Change | None:
        """Of one block; None where it has no LoRA."""
        return together(self.changes[module] for module in self.changes if inside(module, block))

    def projection(self, name: str) -> Change | None:
        """Of one of `projections`, over all blocks; None where it has no LoRA."""
        end = projections(self.config)[name]
        return together(change for module, change in self.changes.items() if module.endswith(end))

    def whole(self) -> Change:
        """Of everything."""
        found = together(self.changes.values())
        if found is None:
            raise HollowError(f"{self.name} holds nothing but NaN and infinity. Get or train it again.")
        return found

    def hollow_share(self, cut: Cut) -> float:
        """The share of Σ|ΔW| that lies in what a cut removes, from 0 to 1; 0 of no change at all."""
        gone = hollowed(self.config, cut)
        total = sum(
            change.total for module, change in self.changes.items() if any(inside(module, block) for block in gone)
        )
        return total / self.whole().total if self.whole().total else 0.0

    def row(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        whole = self.whole()
        ranks = [2**power for power in range(12) if 2**power < len(whole.squares)]
        gone = [] if self.cut is None else hollowed(self.config, self.cut)
        return {
            "name": self.name,
            "cut": self.cut,
            "text_layers": self.text_layers,
            "besides": self.besides,
            "differences": self.differences,
            "not_measured": list(self.not_measured),
            "whole": _row(whole),
            "kept_by_rank": {rank: round(whole.kept(rank), 4) for rank in [*ranks, len(whole.squares)]},
            "blocks": [
                {
                    "block": block.name,
                    "slot": block.slot,
                    "module": block.modules[-1],
                    "hollowed": block in gone,
                    **_row(change := self.block(block)),
                    "share": change.total / whole.total if change and whole.total else 0.0,
                }
                for block in blocks(self.config)
            ],
            "projections": {name: _row(self.projection(name)) for name in projections(self.config)},
            "modules": {
                module: {"rank": rank, "alpha": _finite(alpha), **_row(self.changes.get(module))}
                for module, (rank, alpha) in self.lora.items()
            },
            "flags": [flag._asdict() for flag in self.flags],
        }


def analyze(
    name: str,
    lora: Mapping[str, LoraLayer],
    config: Config,
    *,
    cut: Cut | None = None,
    base: BaseWeights | None = None,
    text_layers: int = 0,
    differences: Iterable[tuple[str, Tensor]] = (),
    not_measured: Sequence[str] = (),
    progress: Callable[[int, int], object] | None = None,
) -> Analysis:
    """Measure every module of a LoRA on a network with this config; `base` gives the relative change, too.

    `differences` are (module, ΔW) of further modules; `cut`, `text_layers` and `not_measured` are only noted. Raises
    HollowError for a LoRA of which no module belongs to this U-Net, and for one without a finite number.
    """
    known = blocks(config)
    if not any(inside(module, block) for module in lora for block in known):
        raise HollowError(f"{name} changes no layer of {called_in(config)}. Give the model that it was made for.")
    changes = {}
    for number, (module, layer) in enumerate(lora.items(), start=1):
        if _is_measurable(layer):
            changes[module] = measure(layer, None if base is None else base(module))
        if progress is not None:
            progress(number, len(lora))
    described = {module: (len(layer.down), layer.alpha) for module, layer in lora.items()}
    flags = _flags(lora, changes, base is not None)
    counted = 0
    for module, difference in differences:
        if module in lora:
            flags.append(Flag(module, "has a full difference beside its LoRA, which is not measured"))
        elif difference.double().norm().item() < LARGEST:
            changes[module] = measure_difference(difference, None if base is None else base(module))
            counted += 1
        else:
            flags.append(Flag(module, "holds NaN, infinity or the like"))
    analysis = Analysis(name, config, described, changes, flags, cut, text_layers, counted, not_measured)
    analysis.whole()
    return analysis


def analyze_file(
    path: Path,
    config: Config | None = None,
    *,
    name: str | None = None,
    base: BaseWeights | None = None,
    unet_only: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Analysis:
    """`analyze` of a LoRA file of any dialect, with the full differences of weights that it may hold besides.

    `config` is the network's; None takes that of the public model of which the file tells. `unet_only` leaves out what
    is for text encoders. Raises HollowError as `lora.file.read`, `lora.file.differences` and `analyze` do.
    """
    lora, metadata = read(path, config, unet_only=unet_only)
    config = config or config_of(metadata, lora.shapes)
    recipe, full = recipe_of(metadata), differences_in(lora.left_out, config)
    return analyze(
        name or path.stem,
        lora.layers,
        config,
        cut=None if recipe is None else recipe.cut,
        base=base,
        text_layers=len(lora.text),
        differences=differences(path, full, config),
        not_measured=[key for key in lora.left_out if key not in full and not of_text(key)],
        progress=progress,
    )


def analyze_files(
    paths: Sequence[Path],
    model: Path | None = None,
    progress: Callable[[int, int], object] | None = None,
    *,
    unet_only: bool = False,
) -> list[Analysis]:
    """`analyze_file` of several, all for one kind of network; with the base `model` (a .safetensors checkpoint or a
    diffusers folder) in relation to its weights, too.

    Raises HollowError as `analyze_file` does, and for files of different kinds of networks.
    """
    config = None if model is None else outline(str(model)).network.config
    base = None if model is None or config is None else base_weights(model, config)
    analyses: list[Analysis] = []
    for number, path in enumerate(paths):

        def report(done: int, of: int, before: int = number) -> None:
            if progress is not None:  # in hundredths of a file
                progress(100 * before + 100 * done // of, 100 * len(paths))

        name = path.name if [each.name for each in paths].count(path.name) == 1 else f"{path.parent.name}/{path.name}"
        analysis = analyze_file(path, config, name=name, base=base, unet_only=unet_only, progress=report)
        if analyses and analysis.config != analyses[0].config:
            raise HollowError(f"{path} is for another base model than {paths[0]}. Analyze them one by one.")
        analyses.append(analysis)
    return analyses


class Suggestion(NamedTuple):
    """The cut that an analysis recommends."""

    cut: Cut
    share: float
    """Of all change, in its hollow; the mean where there are several LoRAs."""
    block_weights: str
    """For the usual tools: 0 for what it hollows, 1 for the rest. So one sees what training it would leave out."""


def suggest(analyses: Sequence[Analysis], share: float = SMALL_SHARE) -> Suggestion | None:
    """The deepest cut whose hollow holds no more than `share` of all change; None where even the least cut holds more.

    Raises HollowError for a share that is none.
    """
    if not 0 <= share <= 1:
        raise HollowError(f"{share:g} is no share of the change. Choose one from 0 to 1, such as 0.1.")
    config = analyses[0].config
    known = cuts(config)
    shares = [mean(each.hollow_share(cut) for each in analyses) for cut in known]
    fitting = [number for number, held in enumerate(shares) if held <= share]
    if not fitting:
        return None
    cut, held = known[fitting[-1]], shares[fitting[-1]]
    everywhere = any(block.kind != "RA" and each.block(block) for each in analyses for block in blocks(config))
    return Suggestion(cut, held, without(config, hollowed(config, cut), all_blocks=everywhere))


def sides(analyses: Sequence[Analysis]) -> list[Sequence[Analysis]]:
    """What is looked at as one: a LoRA, or each of two that are compared, or all of many."""
    return [[each] for each in analyses] if len(analyses) <= 2 else [analyses]


class Spread(NamedTuple):
    """Of one figure over several LoRAs, as the paper's Fig. 2 has it."""

    mean: float
    deviation: float
    """Standard deviation over these very LoRAs (the population's)."""


def spread(changes: Sequence[Change | None]) -> Spread | None:
    """Of Eq. 3 over the LoRAs that have the block; None where none has."""
    return _spread([change.mean for change in changes if change is not None])


def spread_relative(changes: Sequence[Change | None]) -> Spread | None:
    """The same of the relative change, where the base model is known."""
    return _spread([change.relative for change in changes if change is not None and change.relative is not None])


def inside(module: str, block: Block | Layer) -> bool:
    """Whether a module is part of a block."""
    return any(f"{module}.".startswith(f"{path}.") for path in block.modules)


def projections(config: Config) -> dict[str, str]:
    """{"attn1.q": the end of the modules' names}: of a U-Net's self- and cross-attention (attn1, attn2), of a
    transformer's image and text."""
    family = family_in(config)
    ends = [f"{each}.{name}" for each in ("attn1", "attn2") for name in _QKV] if family is None else family.attention
    rows = ("attn1", "attn2") if family is None else ("image", "text")
    names = [f"{row}.{name}" for row in rows for name in ("q", "k", "v", "out")]
    return {name: f".{end}" for name, end in zip(names, ends, strict=False)}


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread(mean(values), pstdev(values)) if values else None


def _is_measurable(layer: LoraLayer) -> bool:
    """Without NaN and infinity, now and in fp32 products: ‖BA‖ ≤ ‖B‖‖A‖."""
    tensors = [tensor for tensor in (layer.down, layer.up, layer.dora_scale) if tensor is not None]
    norms = [tensor.double().norm().item() for tensor in tensors]
    return all(norm < LARGEST for norm in [*norms, abs(layer.scale) * norms[0] * norms[1]])


def _flags(lora: Mapping[str, LoraLayer], changes: Mapping[str, Change], with_base: bool) -> list[Flag]:
    flags = []
    typical = median([change.mean for change in changes.values() if change.total] or [0.0])
    for module, layer in lora.items():
        if module not in changes:
            flags.append(Flag(module, "holds NaN, infinity or the like"))
            continue
        if not layer.up.any():
            flags.append(Flag(module, "has no effect: its up matrix is all zero"))
        if not USUAL_SCALE[0] <= layer.scale <= USUAL_SCALE[1]:
            flags.append(Flag(module, f"has an odd alpha, {layer.alpha:g} at rank {len(layer.down)}"))
        if changes[module].mean > OUTLIER * typical:
            flags.append(Flag(module, f"changes {changes[module].mean / typical:.0f} times as much as is usual here"))
        if layer.dora_scale is not None and not with_base:
            flags.append(Flag(module, "is a DoRA, whose magnitudes count only with the model at hand"))
    return flags


def _row(change: Change | None) -> dict[str, Any]:
    if change is None:
        return {"mean": None, "total": 0.0, "relative": None, "effective_rank": None}
    return {
        "mean": change.mean,
        "total": change.total,
        "relative": change.relative,
        "effective_rank": change.effective_rank,
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
