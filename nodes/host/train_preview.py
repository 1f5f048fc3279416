"""What the training node shows while it runs: the course of the loss, and what the U-Net has learned so far."""

import math
from collections.abc import Iterable
from itertools import accumulate, count
from typing import TYPE_CHECKING

import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from ...hollow_core.nets.network import Network
    from ...hollow_core.nets.schedule import NoiseSchedule
    from ...hollow_core.training.store import Store

SIDE = 512  # of a picture, in pixels: the node shows two side by side, a third as large
LETTERS, MARGIN, LINE = 34, 10, 42
HELD_OUT = "#d06a00"
WINDOW = 20  # steps at least, of which the mean is drawn
TIMESTEP = 600  # noisy enough that the LoRA shows, not so much that nothing can be seen


class LossCurve:
    """The losses of a training, drawn smoothed: one step's says little, as each has another time step."""

    def __init__(self, losses: Iterable[float], held_out: Iterable[tuple[int, float]] = ()) -> None:
        """With those of the steps that were done before; `held_out` are the losses of held-out pictures, and after how
        many steps."""
        self.sums = [0.0, *accumulate(losses)]
        self.held_out = [*held_out]

    def add(self, loss: float) -> None:
        """One more step's."""
        self.sums.append(self.sums[-1] + loss)

    @property
    def steps(self) -> int:
        """Of how many steps there are losses."""
        return len(self.sums) - 1

    @property
    def window(self) -> int:
        """Over how many steps the mean goes: a twentieth of them, and WINDOW at least if there are so many."""
        return min(max(WINDOW, self.steps // 20), self.steps)

    def mean(self, end: int) -> float:
        """The mean loss of the `window` steps up to step `end`, the first of which is 1."""
        start = max(0, end - self.window)
        return (self.sums[end] - self.sums[start]) / (end - start)

    def draw(self) -> Image.Image:
        """SIDE × SIDE: the moving mean over the steps, and the losses of held-out pictures; the last of each in words.
        There must be a loss."""
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(LETTERS)
        shown = range(self.steps, 0, -max(1, self.steps // SIDE))
        means = {step: self.mean(step) for step in shown}
        drawn = [*means.values(), *(loss for _, loss in self.held_out)]
        low, high = min(drawn), max(drawn)
        if high == low:
            low, high = 0.0, high or 1.0
        levels = ticks(low, high)
        steps = [step for step in ticks(0, self.steps) if step >= 1 and float(step).is_integer()]
        left = 2 * MARGIN + max(font.getlength(f"{level:g}") for level in levels)
        lines = 3 if self.held_out else 2
        right, top, bottom = SIDE - 2 * MARGIN, lines * LINE + 2 * MARGIN, SIDE - LINE - MARGIN

        def place(step: float, loss: float) -> tuple[float, float]:
            across = max(0, step - 1) / max(1, self.steps - 1)
            return left + across * (right - left), bottom - (loss - low) / (high - low) * (bottom - top)

        canvas.text((MARGIN, MARGIN), f"mean loss {self.mean(self.steps):.4f}", "black", font)
        canvas.text((MARGIN, MARGIN + LINE), f"of the last {self.window} steps", "#666666", font)
        for level in levels:
            y = place(1, level)[1]
            canvas.line((left, y, right, y), "#dddddd", 2)
            canvas.text((left - MARGIN, y), f"{level:g}", "#666666", font, anchor="rm")
        for step in steps:
            x = place(step, low)[0]
            canvas.line((x, bottom, x, bottom + MARGIN), "#666666", 2)
            half = font.getlength(f"{step:.0f}") / 2
            canvas.text((min(x, SIDE - MARGIN - half), bottom + MARGIN), f"{step:.0f}", "#666666", font, anchor="ma")
        canvas.line((left, bottom, right, bottom), "#666666", 2)
        canvas.line([place(step, mean) for step, mean in means.items()], "#2a6fdb", 5)
        if self.held_out:
            points = [place(step, loss) for step, loss in self.held_out]
            canvas.text((MARGIN, MARGIN + 2 * LINE), f"held out {self.held_out[-1][1]:.4f}", HELD_OUT, font)
            canvas.line(points, HELD_OUT, 3)
            for across, down in points:
                canvas.ellipse((across - 6, down - 6, across + 6, down + 6), HELD_OUT)
        return picture


def ticks(low: float, high: float) -> list[float]:
    """One to five round numbers from `low` to `high`, which is above it."""
    sizes = (digit * 10.0**power for power in count(math.floor(math.log10(high - low)) - 1) for digit in (1, 2, 5))
    size, first, last = next(
        (size, first, last)
        for size in sizes
        if (last := math.floor(high / size)) - (first := math.ceil(low / size)) < 5
    )
    return [number * size for number in range(first, last + 1)]


class Preview:
    """The training record nearest to TIMESTEP, as the U-Net would now denoise it in one step."""

    def __init__(self, model: ModelPatcher, network: "Network", schedule: "NoiseSchedule", store: "Store") -> None:
        self.latent_format, self.network, self.schedule = model.model.latent_format, network, schedule
        index = min(store.indices("image"), key=lambda index: abs(store.records[index].timestep - TIMESTEP))
        self.record = store.record(index)
        self.latents, self.conditioning = store.inputs(self.record.image)

    @torch.no_grad()
    def draw(self) -> Image.Image:
        """SIDE × SIDE, in the colours by which ComfyUI previews latents."""
        noisy, _ = self.record.noisy(self.schedule, self.latents)
        timestep = self.record.timestep
        predicted = self.network.predict(noisy, [timestep], self.conditioning, self.record.stored).cpu()
        clean = self.schedule.clean(noisy, predicted, timestep)
        factors = torch.tensor(self.latent_format.latent_rgb_factors)
        bias = torch.tensor(self.latent_format.latent_rgb_factors_bias or [0.0, 0.0, 0.0])
        colors = torch.einsum("chw,cr->hwr", clean[0], factors) + bias
        pixels = ((colors + 1) / 2).clamp(0, 1).mul(255).byte().numpy()
        return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def beside(left: Image.Image, right: Image.Image | None) -> Image.Image:
    """Two pictures of SIDE × SIDE as one, or the left one alone."""
    if right is None:
        return left
    both = Image.new("RGB", (2 * SIDE, SIDE))
    both.paste(left, (0, 0))
    both.paste(right, (SIDE, 0))
    return both
