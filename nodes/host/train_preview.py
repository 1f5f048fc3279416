"""What the training node shows while it runs: the course of the loss, and what the U-Net has learned so far."""

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from ...hollow_core.nets.network import Network
    from ...hollow_core.nets.schedule import NoiseSchedule
    from ...hollow_core.training.store import Store

SIDE = 256  # of a picture, in pixels
MARGIN = 8
TIMESTEP = 600  # noisy enough that the LoRA shows, not so much that nothing can be seen


class LossCurve:
    """The losses of a run, drawn smoothed: one step's says little, as each has another time step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def add(self, loss: float) -> None:
        """One more step's."""
        self.losses.append(loss)

    def draw(self) -> Image.Image:
        """The moving mean over a twentieth of the run, SIDE × SIDE, its last value below."""
        window = max(1, len(self.losses) // 20)
        sums = [0.0, *accumulate(self.losses)]
        starts = [max(0, end - window) for end in range(1, len(sums))]
        smooth = [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, 1)]
        low, high = min(smooth), max(smooth)
        reach, span = SIDE - 2 * MARGIN, (high - low) or 1.0
        points = [
            (MARGIN + i * reach / max(1, len(smooth) - 1), MARGIN + (high - value) * reach / span)
            for i, value in enumerate(smooth)
        ]
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        draw = ImageDraw.Draw(picture)
        if len(points) > 1:
            draw.line(points, fill="#2a6fdb", width=2)
        draw.text((MARGIN, SIDE - 2 * MARGIN), f"loss {smooth[-1]:.4f}", fill="black")
        return picture


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
