"""An analysis as a picture: the U with every block in it, or a transformer's column of blocks; the paper's bars beside
it (Fig. 2), the projections below.

The scale of colours is the same in every picture, so that two of them compare.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from ..nets.families import family_in
from ..nets.network import Cut
from ..nets.unet_layers import Layer, layers
from .blocks import Block, blocks, hollowed
from .change import Change
from .report import SMALL_SHARE, Analysis, Suggestion, projections, sides, spread, spread_relative, suggest

CHANGE_SCALE = (1e-5, 1e-1)  # of mean |ΔW|, logarithmic
RELATIVE_SCALE = (1e-3, 1.0)  # of ‖ΔW‖ / ‖W‖
COLOURS = ("#2a6fdb", "#e8862e")  # of the bars: A and B
_MAP, _CUT, _HATCH = "YlGnBu", "#d1495b", "#dedede"
_DPI = 120
_LONGEST = 60  # letters of a name
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

# Of the U, in rows: the width of a cell, how much it moves inwards with each level, the gap in the middle.
_WIDTH, _INWARDS, _GAP = 5.2, 0.62, 2.2
_SMALL = 0.66  # the height of an upsampler's cell
_LOW = 0.5  # and of a transformer's block


class _Place(NamedTuple):
    left: float
    bottom: float
    width: float
    height: float


class _Cell(NamedTuple):
    value: str
    note: str
    colour: Any
    ink: str
    hatch: str = ""


class _Scale(NamedTuple):
    """From a figure to its colour and its text."""

    paint: Any  # matplotlib's ScalarMappable
    relative: bool

    def text(self, figure: float) -> str:
        if self.relative:
            return f"{100 * figure:.2g} %"
        if not figure:
            return "0"
        digits, power = f"{figure:.1e}".split("e")
        return f"{digits}·10{str(int(power)).translate(_RAISED)}"


def picture(analyses: Sequence[Analysis], share: float = SMALL_SHARE) -> Image.Image:
    """One LoRA, two side by side (A and B), or the mean and the spread of several; with the cut that `suggest`
    recommends for `share`.

    Where all of them know the base model, the U's colours are the relative change, otherwise mean |ΔW|; the bars
    are always mean |ΔW|. All belong to networks of one config.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    panels = sides(analyses)
    relative = all(each.whole().relative is not None for each in analyses)
    config = analyses[0].config
    places = _column(blocks(config)) if family_in(config) is not None else _places(layers(config))
    top = max(place.bottom + place.height for place in places.values())
    height, width = 0.43 * (top + 3.5) + 1.2, 7.6
    figure = Figure(figsize=(width * len(panels) + 5.2, height), dpi=_DPI, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, len(panels) + 1, width_ratios=[width] * len(panels) + [5.2], height_ratios=[5, 1])
    scale = _Scale(ScalarMappable(LogNorm(*(RELATIVE_SCALE if relative else CHANGE_SCALE)), _MAP), relative)
    axes = []
    for number, side in enumerate(panels):
        axes.append(figure.add_subplot(grid[:, number]))
        _draw_blocks(axes[-1], side, places, scale, suggest(side, share))
        title = _title(side, "AB"[number] if len(panels) == 2 else "")
        axes[-1].set_title(title, fontsize=11, fontweight="bold", parse_math=False)  # a name may have dollars
    bar = figure.colorbar(scale.paint, ax=axes, location="bottom", extend="both", shrink=0.6, aspect=45, pad=0.01)
    bar.set_label("change in relation to the weights, ‖ΔW‖ / ‖W‖" if relative else "mean |ΔW|", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    _draw_bars(figure.add_subplot(grid[0, -1]), panels)
    _draw_projections(figure.add_subplot(grid[1, -1]), panels, scale)
    note = "The size of a change is not its influence on the picture."
    if flags := sum(len({flag.module for flag in each.flags}) for each in analyses):
        note = f"{flags} {'module looks' if flags == 1 else 'modules look'} wrong; the figures tell which.   {note}"
    figure.supxlabel(note, fontsize=9, color="#666666")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name may have letters that the font has not
        canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")


def _title(side: Sequence[Analysis], letter: str) -> str:
    if len(side) > 1:
        return f"mean of {len(side)} LoRAs"
    name = side[0].name if len(side[0].name) <= _LONGEST else f"{side[0].name[: _LONGEST - 1]}…"
    cut = "" if side[0].cut is None else f", hollowed at {_said(side[0].cut)}"
    return f"{letter}: {name}{cut}" if letter else f"{name}{cut}"


def _places(known: Sequence[Layer]) -> dict[str, _Place]:
    """By the paper's names, and of "conv_in": the makers of skip connections are on a level with their users."""
    down, mid, up = ([layer for layer in known if layer.side == side] for side in ("down", "mid", "up"))
    makers = ["conv_in", *(layer.name for layer in down)]
    deepest = int(mid[0].name.split("-")[0]) - 1
    right = (deepest - 1) * 2 * _INWARDS + 2 * _WIDTH + _GAP
    places, bottom = {}, 0.0
    for layer in up:
        level = 2 * deepest + 1 - int(layer.name.split("-")[0])
        size = _SMALL if layer.kind == "upsampler" else 1.0
        places[layer.name] = _Place(right - (level - 1) * _INWARDS - _WIDTH, bottom, _WIDTH, size)
        if layer.kind != "upsampler":
            name = makers.pop()
            indent = 0 if name == "conv_in" else int(name.split("-")[0]) - 1
            places[name] = _Place(indent * _INWARDS, bottom, _WIDTH, size)
        bottom += size
    wide = 0.86 * _WIDTH
    for number, layer in enumerate(mid):
        places[layer.name] = _Place(right / 2 + (number - len(mid) / 2) * (wide + 0.1) + 0.05, -1.7, wide, 1.0)
    return places


def _column(known: Sequence[Block]) -> dict[str, _Place]:
    """A transformer's blocks, by name, the first at the top."""
    return {
        block.name: _Place(0.0, _LOW * (len(known) - 1 - number), 2 * _WIDTH, _LOW)
        for number, block in enumerate(known)
    }


def _said(cut: Cut) -> str:
    return f"k={cut}" if isinstance(cut, int) else f"{cut[0]},{cut[1]}"


def _draw_blocks(
    axes: Any, side: Sequence[Analysis], places: Mapping[str, _Place], scale: _Scale, suggestion: Suggestion | None
) -> None:
    config = side[0].config
    known, unet = blocks(config), family_in(config) is None
    hollows = [hollowed(config, each.cut) for each in side if each.cut is not None]
    right = max(place.left + place.width for place in places.values())
    top = max(place.bottom + place.height for place in places.values())
    if unet:
        _draw_skips(axes, layers(config), places)
        _draw_cell(axes, places["conv_in"], ("IN00", "conv_in"), _Cell("", "", "white", "#999999"))
    for block in known:
        cell = _cell([each.block(block) for each in side], scale, any(block in hollow for hollow in hollows))
        module = block.kind if block.kind == "upsampler" else block.modules[-1]  # its cell is small
        _draw_cell(axes, places[block.name], (block.label, module), cell)
    if suggestion is not None and not isinstance(suggestion.cut, int):
        front, back = suggestion.cut
        for height in (_LOW * (len(known) - front), _LOW * back):
            axes.plot([-0.2, right + 0.2], [height] * 2, color=_CUT, linestyle=(0, (5, 3)), linewidth=1.6, zorder=5)
        say = f"recommended cut: {front},{back}. {100 * suggestion.share:.1f} % of the change is outside these lines"
        axes.text(-0.1, -0.3, say, fontsize=8, color=_CUT, va="top")
    elif suggestion is not None:
        gone = [places[block.name] for block in hollowed(config, suggestion.cut)]
        edge = max(max(place.bottom + place.height for place in gone), -0.35)
        axes.plot([-0.2, right + 0.2], [edge, edge], color=_CUT, linestyle=(0, (5, 3)), linewidth=1.6, zorder=5)
        say = f"recommended cut: k={suggestion.cut}\n{100 * suggestion.share:.1f} % of the change\nis below this line"
        axes.text(-0.1, -0.5, say, fontsize=8, color=_CUT, va="top", linespacing=1.35)
    axes.set_xlim(-0.3, right + 0.3)
    axes.set_ylim(-1.9, top + 0.1)
    axes.axis("off")


def _draw_skips(axes: Any, known: Sequence[Layer], places: Mapping[str, _Place]) -> None:
    """A line for each skip connection, with the smallest cut that takes it."""
    users = [layer for layer in known if layer.side == "up" and layer.kind != "upsampler"]
    makers = ["conv_in", *(layer.name for layer in known if layer.side == "down")]
    middle = max(place.left + place.width for place in places.values()) / 2
    for cut, (user, maker) in enumerate(zip(users, reversed(makers), strict=True), start=1):
        start, end = places[maker], places[user.name]
        height = end.bottom + end.height / 2
        axes.plot([start.left + start.width, end.left], [height] * 2, color="#cccccc", linewidth=0.8, zorder=0)
        if maker != "conv_in":
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            axes.text(middle, height, f"k={cut}", fontsize=7, color="#888888", ha="center", va="center", bbox=box)


def _draw_cell(axes: Any, place: _Place, names: tuple[str, str], cell: _Cell) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y, width, height = place.left, place.bottom + 0.05, place.width, place.height - 0.1

    def box(edge: str, **style: Any) -> None:
        shape = "round,pad=0,rounding_size=0.12"
        axes.add_patch(FancyBboxPatch((x, y), width, height, shape, edgecolor=edge, linewidth=0.7, **style))

    if cell.hatch:
        box(_HATCH, facecolor="white", hatch=cell.hatch)
        box("#c4c4c4", facecolor="none")
    else:
        box("#c4c4c4" if cell.colour == "white" else "#8a8a8a", facecolor=cell.colour)
    (first, second), right, middle = names, x + width - 0.15, y + height / 2
    ink: dict[str, Any] = {"color": cell.ink, "va": "center"}
    if place.height < 1:
        axes.text(x + 0.15, middle, f"{first}  {second}", fontsize=6.3, **ink)
        axes.text(right, middle, cell.value, fontsize=7, ha="right", **ink)
        return
    upper, lower = y + 0.7 * height, y + 0.27 * height
    axes.text(x + 0.15, upper, first, fontsize=8, fontweight="bold", **ink)
    axes.text(x + 0.15, lower, second, fontsize=6.3, **ink)
    axes.text(right, upper, cell.value, fontsize=7 if cell.hatch else 8, ha="right", **ink)
    axes.text(right, lower, cell.note, fontsize=6.3, ha="right", **ink)


def _draw_bars(axes: Any, panels: Sequence[Sequence[Analysis]]) -> None:
    known = blocks(panels[0][0].config)
    names = [f"{block.name}  {block.slot:<5}" if block.slot else block.name for block in known]
    every = [[spread([each.block(block) for each in side]) for block in known] for side in panels]
    largest = max((found.mean + found.deviation for row in every for found in row if found), default=0.0) or 1.0
    thick = 0.8 / len(panels)
    for number, row in enumerate(every):
        at = [place + (number - (len(panels) - 1) / 2) * thick for place in range(len(known))]
        values = [found.mean if found else 0.0 for found in row]
        errors = [found.deviation if found else 0.0 for found in row] if len(panels[number]) > 1 else None
        axes.barh(
            at,
            values,
            height=thick,
            color=COLOURS[number],
            xerr=errors,
            error_kw={"ecolor": "#444444", "elinewidth": 0.9, "capsize": 2},
            label="AB"[number] if len(panels) > 1 else None,
        )
    without = [place for place, found in enumerate(zip(*every, strict=True)) if not any(found)]
    axes.barh(
        without, largest, color="none", edgecolor="#dddddd", hatch="////", linewidth=0, height=0.8, label="no LoRA"
    )
    axes.set_yticks(range(len(known)), names, fontsize=7.5, family="monospace")
    if without or len(panels) > 1:
        axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    axes.set_ylim(len(known) - 0.4, -0.6)
    axes.set_xlim(0, largest * 1.03)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.get_offset_text().set_fontsize(8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(
        "mean |ΔW| of each block (Eq. 3)" + (", ± standard deviation" if len(panels[0]) > 1 else ""), fontsize=9
    )


def _draw_projections(axes: Any, panels: Sequence[Sequence[Analysis]], scale: _Scale) -> None:
    from matplotlib.patches import Rectangle

    config = panels[0][0].config
    known = list(projections(config))
    groups = dict.fromkeys(name.split(".")[0] for name in known)
    rows = [(side, letter, group) for side, letter in zip(panels, "AB", strict=False) for group in groups]
    for down, (side, _, attention) in enumerate(rows):
        for across, name in enumerate(name for name in known if name.startswith(attention)):
            cell = _cell([each.projection(name) for each in side], scale)
            edge = _HATCH if cell.hatch else "white"
            axes.add_patch(
                Rectangle((across, down), 1, 1, facecolor=cell.colour, edgecolor=edge, hatch=cell.hatch, linewidth=0.8)
            )
            axes.text(across + 0.5, down + 0.5, cell.value, ha="center", va="center", fontsize=8, color=cell.ink)
    axes.set_xlim(0, 4)
    axes.set_ylim(len(rows), 0)
    axes.set_xticks([0.5, 1.5, 2.5, 3.5], ["q", "k", "v", "out"], fontsize=8)
    labels = [f"{letter} {attention}" if len(panels) > 1 else attention for _, letter, attention in rows]
    axes.set_yticks([place + 0.5 for place in range(len(rows))], labels, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    what = "self-attention (attn1) and cross-attention (attn2)" if family_in(config) is None else "attention"
    axes.set_xlabel(f"{what}, all blocks", fontsize=8)


def _cell(changes: Sequence[Change | None], scale: _Scale, hollowed: bool = False) -> _Cell:
    found = (spread_relative if scale.relative else spread)(changes)
    if found is None:
        return _Cell("hollowed" if hollowed else "no LoRA", "", "white", "#666666", "xxxx" if hollowed else "////")
    colour = scale.paint.to_rgba(max(found.mean, scale.paint.norm.vmin))
    dark = sum(weight * part for weight, part in zip((0.3, 0.59, 0.11), colour, strict=False)) < 0.5
    note = (
        f"rank {changes[0].effective_rank}" if len(changes) == 1 and changes[0] else f"± {scale.text(found.deviation)}"
    )
    return _Cell(scale.text(found.mean), note, colour, "white" if dark else "#1a1a1a")
