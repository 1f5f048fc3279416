"""Stage 2 in ComfyUI: a store in, a LoRA out."""

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...hollow_core.errors import HollowError
from ...hollow_core.progress import Progress
from ..handles import HollowActivations, HollowedModel, HollowLora
from .memory import alone_on_device, clear_device
from .progress import NodeProgress
from .unet import diffusers_unet, layout, noise_schedule

if TYPE_CHECKING:
    from ...hollow_core.activations import Store
    from ...hollow_core.train import TrainSettings

PREVIEW_TIMESTEP = 600  # noisy enough that the LoRA shows, not so much that nothing can be seen


def train(
    hollowed: HollowedModel,
    activations: HollowActivations,
    settings: "TrainSettings",
    preview_every: int,
    *,
    node_id: str,
) -> tuple[HollowLora, list[float]]:
    """The LoRA and the loss of each step; goes on where the same settings were cancelled.

    Raises HollowError as `hollow_core.train.train` does and where the loss stops being finite, and ComfyUI's
    exception on Cancel.
    """
    from ...hollow_core import lora_file
    from ...hollow_core import train as stage
    from ...hollow_core.activations import Store
    from ...hollow_core.hollow import hollow

    store = Store.open(activations.folder)
    if store.cut != hollowed.cut:
        raise HollowError(
            f"The activations were precomputed for cut {store.cut}, but this Hollow U-Net has cut {hollowed.cut}. "
            "Connect the same one to both nodes."
        )
    schedule, family = noise_schedule(hollowed.model), layout(hollowed.model)
    fixed = {name: value for name, value in asdict(settings).items() if name not in stage.FREE_TO_CHANGE}
    folder = store.folder / f"training-{hashlib.sha256(json.dumps(fixed).encode()).hexdigest()[:12]}"
    watch = NodeProgress(node_id, "Train")
    # nodes run in inference mode, where nothing can be trained
    with torch.inference_mode(False), torch.enable_grad():
        clear_device()
        unet = hollow(diffusers_unet(hollowed.model), hollowed.cut, {record.timestep for record in store.records})
        losses: list[float] = []

        def tell(done: Progress) -> None:
            losses.append(done.loss or 0.0)
            preview = bool(preview_every) and done.step % preview_every == 0
            if preview or done.step % 10 == 0:
                watch.picture = _picture(losses, _preview(hollowed, unet, schedule, store) if preview else None)
            watch.tell(done)
            watch.picture = None

        with alone_on_device(unet):
            result = stage.train(unet, schedule, store, settings, folder=folder, progress=tell, stop=watch.stop)
    watch.finish()
    if result.stopped != "finished":
        raise HollowError(
            f"Training stopped at step {result.steps} ({result.stopped}). "
            "Lower the learning rate, or choose another precision."
        )
    recipe = lora_file.Recipe(
        cut=hollowed.cut,
        identifier=activations.identifier,
        class_word="",
        personal_prompt=activations.personal_prompt,
        generic_prompt=activations.generic_prompt,
        prediction_type=schedule.config.prediction_type,
    )
    state = lora_file.to_kohya(result.state, unet.config, alpha=settings.lora_alpha, layout=family)
    metadata = lora_file.describe("hollow", family, settings.rank, settings.lora_alpha, recipe)
    return HollowLora(state, recipe, metadata), result.losses


@torch.no_grad()
def _preview(hollowed: HollowedModel, unet: Any, schedule: Any, store: "Store") -> Image.Image:
    """What the U-Net makes of the record nearest to PREVIEW_TIMESTEP: the picture it would denoise to in one step,
    in the colours by which ComfyUI previews latents."""
    images = [store.records[index] for index in store.indices("image")]
    nearest = min(images, key=lambda record: abs(record.timestep - PREVIEW_TIMESTEP))
    record = store.record(store.records.index(nearest))
    latents, conditioning = store.inputs(record.image)
    weight = unet.conv_in.weight
    noisy, _ = record.noisy(schedule, latents)
    with torch.autocast(weight.device.type, enabled=weight.dtype == torch.float32 and weight.device.type != "cpu"):
        predicted = unet(
            noisy.to(weight.device, weight.dtype),
            record.timestep,
            exit_activation=record.exit_activation,
            **conditioning.to(weight.device, weight.dtype).kwargs(),
        ).sample
    clean = _clean(schedule, noisy, predicted.float().cpu(), record.timestep)
    latent_format = hollowed.model.model.latent_format
    factors = torch.tensor(latent_format.latent_rgb_factors)
    bias = torch.tensor(latent_format.latent_rgb_factors_bias or [0.0, 0.0, 0.0])
    colors = torch.einsum("chw,cr->hwr", clean[0], factors) + bias
    pixels = ((colors + 1) / 2).clamp(0, 1).mul(255).byte().numpy()
    return Image.fromarray(pixels).resize((256, 256), Image.Resampling.BILINEAR)


def _clean(schedule: Any, noisy: Tensor, predicted: Tensor, timestep: int) -> Tensor:
    """z_0 as the prediction has it, under epsilon- or v-prediction."""
    alpha, sigma = schedule.alphas_cumprod[timestep].sqrt(), (1 - schedule.alphas_cumprod[timestep]).sqrt()
    if schedule.config.prediction_type == "v_prediction":
        return alpha * noisy - sigma * predicted
    return (noisy - sigma * predicted) / alpha


def _picture(losses: list[float], preview: Image.Image | None) -> Image.Image:
    """The course of the loss, smoothed, 256×256; to the right of it the preview, if there is one."""
    side = 256
    picture = Image.new("RGB", (2 * side if preview else side, side), "white")
    window = max(1, len(losses) // 20)
    smooth = [
        sum(losses[max(0, i - window) : i + 1]) / len(losses[max(0, i - window) : i + 1]) for i in range(len(losses))
    ]
    low, high = min(smooth), max(smooth)
    span = (high - low) or 1.0
    points = [
        (8 + i * (side - 16) / max(1, len(smooth) - 1), 8 + (high - value) * (side - 16) / span)
        for i, value in enumerate(smooth)
    ]
    draw = ImageDraw.Draw(picture)
    if len(points) > 1:
        draw.line(points, fill="#2a6fdb", width=2)
    draw.text((8, side - 16), f"loss {smooth[-1]:.4f}", fill="black")
    if preview is not None:
        picture.paste(preview, (side, 0))
    return picture
