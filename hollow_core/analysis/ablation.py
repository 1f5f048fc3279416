"""What each block of a LoRA does to a picture: the same prompt and seed with the block switched off."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageStat

from ..lora.file import LoraFile
from ..lora.layers import is_dora
from ..models.base_model import BaseModel
from ..sampling.sample import SampleSettings, encode, portions
from .block_weights import factor_of
from .blocks import Block, blocks
from .report import inside

GAIN = 4  # differences are drawn this many times as large
CELL, MARGIN, HEADER, LABEL = 192, 12, 54, 40  # pixels
_COLUMNS = 6
_USUAL = SampleSettings()


class Ablation(NamedTuple):
    """Pictures of one prompt and seed."""

    whole: Image.Image
    """With the LoRA."""
    base: Image.Image
    """Without it."""
    without: dict[Block, Image.Image]
    """With all of it but one block, for each block that has LoRA, in the order in which they run."""

    def influence(self, picture: Image.Image) -> float:
        """The mean difference of a picture to that of the whole LoRA, from 0 to 1."""
        means = ImageStat.Stat(ImageChops.difference(self.whole, picture)).mean
        return sum(means) / len(means) / 255


def ablate(
    model: BaseModel,
    lora: LoraFile,
    prompt: str,
    seed: int = 0,
    settings: SampleSettings = _USUAL,
    *,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Ablation:
    """Draw `prompt` with the LoRA, without it, and with each of its blocks switched off in turn.

    A LoRA of a hollowed training is used on two paths. Raises HollowError as `encode` and `portions` do.
    """
    modules = {key.rsplit(".lora_", 1)[0] for key in lora.state}
    changed = [block for block in blocks(model.network.config) if any(inside(module, block) for module in modules)]
    pictures: list[Image.Image] = []
    texts = encode(model, [prompt], settings, lora=lora, device=device)
    for number, each in enumerate([lora, None, *(_without(lora, block) for block in changed)], start=1):
        pictures += next(portions(model, texts, [seed], settings, lora=each, device=device))
        if progress is not None:
            progress(number, len(changed) + 2)
    whole, base, *without = pictures
    return Ablation(whole, base, dict(zip(changed, without, strict=True)))


def grid(ablation: Ablation, prompt: str) -> Image.Image:
    """Every picture above its difference to that of the whole LoRA, labelled with the block that is off."""
    entries = [("the whole LoRA", ablation.whole), ("no LoRA", ablation.base)]
    entries += [(f"without {block.label}", picture) for block, picture in ablation.without.items()]
    strongest = max((ablation.influence(picture) for picture in ablation.without.values()), default=0.0)
    columns = min(_COLUMNS, len(entries))
    width, height = CELL + MARGIN, 2 * CELL + LABEL + MARGIN
    rows = -(-len(entries) // columns)
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + HEADER), "white")
    pen = ImageDraw.Draw(sheet)
    title, small = ImageFont.load_default(16), ImageFont.load_default(12)
    pen.text((MARGIN, 8), f"Each block of the LoRA switched off in turn: {prompt}", "black", title)
    note = f"Below each: its difference to the whole LoRA's, {GAIN} times as bright. Size of change is not influence."
    pen.text((MARGIN, 32), note, "#666666", small)
    for number, (name, picture) in enumerate(entries):
        left, top = MARGIN + number % columns * width, HEADER + number // columns * height
        influence = ablation.influence(picture)
        colour = "#d1495b" if number > 1 and influence == strongest else "black"
        pen.text((left, top), name, colour, small)
        if number:
            pen.text((left, top + 16), f"difference {100 * influence:.2f} %", colour, small)
        difference = ImageChops.difference(ablation.whole, picture).point(lambda value: min(255, GAIN * value))
        for down, shown in ((0, picture), (CELL, difference)) if number else ((0, picture),):
            sheet.paste(shown.resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top + LABEL + down))
    return sheet


def _without(lora: LoraFile, block: Block) -> LoraFile | None:
    """None where nothing is left."""
    if is_dora(lora.state):  # whose magnitudes go with the matrices
        gone = {key for key in lora.state if inside(key.rsplit(".lora_", 1)[0], block)}
        left = {key: each for key, each in lora.state.items() if key not in gone}
        return lora._replace(state=left) if left else None
    off = dict.fromkeys(block.modules, 0.0)
    state = {
        key: matrix * factor_of(key.rsplit(".lora_", 1)[0], off) if key.endswith("lora_B.weight") else matrix
        for key, matrix in lora.state.items()
    }
    return lora._replace(state=state)
