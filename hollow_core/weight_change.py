"""What a LoRA changed, block by block (Hollowed Net, Sec. 4.1, Eq. 3 and Fig. 2), and which cut that suggests."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from .blocks import Config, Layer, hollowed_layers, layers, max_cut
from .errors import HollowError
from .lora_file import alpha_of, kohya_name

SMALL_SHARE = 0.1  # of all change: what a suggested cut may leave out


class Change(NamedTuple):
    """How much a LoRA changes one layer of the U-Net."""

    layer: str  # the paper's name: "3-2"
    module: str  # diffusers' name of its first module: "down_blocks.2.resnets.1"
    mean: float | None
    """ΔW of Eq. 3, the mean of |w - w'| over the weights that carry LoRA; None where none does."""
    total: float  # Σ|w - w'|


def weight_changes(state: Mapping[str, Tensor], config: Config) -> list[Change]:
    """The change of each layer that may carry a LoRA, in the order in which they run.

    `state` is a file's content in kohya's spelling, `config` the U-Net's. Raises HollowError for a LoRA of which
    no key is a layer of this U-Net.
    """
    found = [_change(state, layer) for layer in layers(config)]
    if all(change.mean is None for change in found):
        raise HollowError("This LoRA changes no layer of this U-Net. Connect the model that it was made for.")
    return found


def suggested_cut(changes: Sequence[Change], config: Config) -> int:
    """The largest cut whose layers hold at most a tenth of all change; 0 if none does."""
    totals = {change.layer: change.total for change in changes}
    allowed = SMALL_SHARE * sum(totals.values())
    fitting = [
        cut
        for cut in range(max_cut(config) + 1)
        if sum(totals[layer.name] for layer in hollowed_layers(config, cut)) <= allowed
    ]
    return max(fitting, default=0)


def chart(changes: Sequence[Change]) -> Image.Image:
    """The changes as bars, as in the paper's Fig. 2; layers without LoRA are hatched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.26 * len(changes) + 1), dpi=110, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    names = [f"{change.layer}  {change.module}" for change in changes]
    largest = max(change.mean or 0.0 for change in changes) or 1.0
    axes.barh(names, [change.mean or 0.0 for change in changes], color="#2a6fdb")
    untrained = [name for name, change in zip(names, changes, strict=True) if change.mean is None]
    axes.barh(untrained, largest, color="none", edgecolor="#cccccc", hatch="////", label="no LoRA here", linewidth=0)
    if untrained:
        axes.legend(loc="lower right")
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:.1e}")
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("mean |ΔW| (size of the change, which is not its influence)")
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")


def _change(state: Mapping[str, Tensor], layer: Layer) -> Change:
    prefixes = tuple(f"{kohya_name(module)}_" for module in [*layer.modules, *layer.ldm])
    names = {key.partition(".")[0] for key in state}
    total, number = 0.0, 0
    for name in (name for name in names if name.startswith(prefixes)):
        change = _difference(state, name)
        total, number = total + change.abs().sum().item(), number + change.numel()
    return Change(layer.name, layer.modules[0], total / number if number else None, total)


def _difference(state: Mapping[str, Tensor], name: str) -> Tensor:
    """(alpha / rank) B A, as a matrix."""
    down, up = state[f"{name}.lora_down.weight"].float(), state[f"{name}.lora_up.weight"].float()
    return alpha_of(state, name, len(down)) / len(down) * up.flatten(1) @ down.flatten(1)
