"""Stage 2 in ComfyUI: a store in, a LoRA out."""

import hashlib
import json
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import comfy.model_management
import torch
from PIL import Image
from torch import Tensor, nn

from ...hollow_core.errors import HollowError
from ...hollow_core.progress import Progress
from ..handles import HollowActivations, HollowedModel, HollowLora
from .files import lora_path
from .lora_files import save_along
from .memory import alone_on_device, clear_device, free_bytes
from .plan import planner_of, setting_of
from .progress import NodeProgress, say
from .train_preview import LossCurve, Preview, beside
from .unet import frozen_network, layout, noise_schedule

if TYPE_CHECKING:
    from ...hollow_core.training.checkpoint import Checkpoint
    from ...hollow_core.training.settings import TrainSettings
    from ...hollow_core.training.store import Store

PICTURE_EVERY = 10  # steps from one picture of the loss to the next


class Trained(NamedTuple):
    """What came of a training."""

    lora: HollowLora
    losses: list[float]
    """Of each step, from the first on."""
    picture: Image.Image
    """The course of the loss, beside what the U-Net has learned."""
    told: str
    """What was done."""


def train(
    hollowed: HollowedModel,
    activations: HollowActivations,
    settings: "TrainSettings",
    preview_every: int,
    save_files: str = "",
    *,
    node_id: str,
) -> Trained:
    """Train, or go on where the same settings were cancelled.

    With a name in `save_files`, each checkpoint on the way leaves a LoRA file in the loras folder, too. Raises
    HollowError for a name that leads out of there, as `hollow_core.training.train.train` does, where the loss stops
    being finite, where it needs more memory than is free and where another ComfyUI trains the same; and ComfyUI's
    exception on Cancel.
    """
    from ...hollow_core.lock import holding
    from ...hollow_core.lora import file as lora_file
    from ...hollow_core.lora.metadata import Recipe, describe
    from ...hollow_core.memory.remedy import check_fits, memory_told
    from ...hollow_core.training import train as stage
    from ...hollow_core.training.settings import DTYPES
    from ...hollow_core.training.store import Store

    if not activations.folder.exists():
        raise HollowError(
            f"The activations in {activations.folder} were deleted. Give Precompute Activations another name, or "
            "restart ComfyUI: then they are made anew."
        )
    store = Store.open(activations.folder)
    if store.cut != hollowed.cut:
        raise HollowError(
            f"The activations were precomputed for cut {store.cut}, but this Hollow U-Net has cut {hollowed.cut}. "
            "Connect the same one to both nodes."
        )
    if save_files:
        lora_path(save_files)  # refuses a name that leads out
        if not settings.save_every:
            raise HollowError(
                "save_files writes a file at each checkpoint, but save_every is 0. Set it to 100, or empty save_files."
            )
    schedule, family = noise_schedule(hollowed.model), layout(hollowed.model)
    if hollowed.gradient_checkpointing and not settings.gradient_checkpointing:
        settings = replace(settings, gradient_checkpointing=True, checkpoint_levels=hollowed.checkpoint_levels)
    recipe = Recipe(
        cut=hollowed.cut,
        identifier=activations.identifier,
        class_word="",
        personal_prompt=activations.personal_prompt,
        generic_prompt=activations.generic_prompt,
        prediction_type=schedule.prediction.name,
    )
    metadata = describe("hollow", family, settings.rank, settings.lora_alpha, recipe, dora=settings.dora)
    folder, begun = _begun(store, settings)
    watch = NodeProgress(node_id, "Train")
    # nodes run in inference mode, where nothing can be trained
    with torch.inference_mode(False), torch.enable_grad():
        clear_device(hollowed.model)
        planner, free = planner_of(hollowed.model), partial(free_bytes, hollowed.model)
        kinds = store.fingerprint.kinds
        latents = [store.inputs(image)[0] for image in range(len(kinds))]
        low = [each for each, kind in zip(latents, kinds, strict=True) if kind.startswith("low ")]
        setting = setting_of(hollowed, latents, settings, len(store.records), low)
        setting = replace(setting, class_images=len(store.indices("prior")))
        check_fits(planner, setting, free(), ["train"])
        base = frozen_network(hollowed, comfy.model_management.get_torch_device())
        network = base.hollow(hollowed.cut, {record.timestep for record in store.records})
        del base  # here the middle leaves memory
        nn.Module.to(network.module, dtype=DTYPES[settings.precision])
        preview = Preview(hollowed.model, network, schedule, store) if preview_every else None
        curve, learned = LossCurve(begun.losses, begun.validation) if begun else LossCurve([]), None

        def lora_of(state: dict[str, Tensor]) -> HollowLora:
            kohya = lora_file.to_kohya(state, network.module.config, alpha=settings.lora_alpha, layout=family)
            return HollowLora(kohya, recipe, metadata)

        def keep(step: int, state: dict[str, Tensor]) -> None:
            if save_files:
                save_along(lora_of(state), save_files, step, hollowed.model)

        def look() -> None:
            nonlocal learned
            if preview is not None:
                with suppress(torch.cuda.OutOfMemoryError):  # a picture is no reason to end
                    learned = preview.draw()

        def tell(done: Progress) -> None:
            curve.add(done.loss or 0.0)
            if done.validation is not None and [done.validation] != [loss for _, loss in curve.held_out[-1:]]:
                curve.held_out.append((done.step, done.validation))
            if preview_every and done.step % preview_every == 0:
                with done.as_used():
                    look()
            drawn = beside(curve.draw(), learned) if done.step % PICTURE_EVERY == 0 else None
            watch.tell(done, curve.mean(done.step), drawn)

        with holding(folder), memory_told(lambda: planner, "train", setting, free), alone_on_device(network.module):
            result = stage.train(
                network, schedule, store, settings, folder=folder, progress=tell, stop=watch.stop, saved=keep
            )
            curve.held_out = result.validation
            if result.stopped == "finished":
                look()
    watch.finish()
    if result.stopped != "finished":
        raise HollowError(f"Training stopped at step {result.steps} ({result.stopped}). {result.trouble}")
    told = f"{result.steps} steps: {watch.made(result.steps)}.\n"
    if result.validation:
        told += f"Mean loss {curve.mean(result.steps):.4f}, held out {result.validation[-1][1]:.4f}."
    else:
        told += f"Mean loss of the last {curve.window}: {curve.mean(result.steps):.4f}."
    picture = beside(curve.draw(), learned)
    say(told, node_id)
    watch.end_picture(picture)
    return Trained(lora_of(result.state), result.losses, picture, told)


def _begun(store: "Store", settings: "TrainSettings") -> tuple[Path, "Checkpoint | None"]:
    """Where these settings train, and what they have done there: apart from it where fewer steps are asked."""
    name = hashlib.sha256(json.dumps(settings.fixed).encode()).hexdigest()[:12]
    folder = store.folder / f"training-{name}"
    begun = _checkpoint(folder)
    if begun is not None and len(begun.losses) > settings.steps:
        folder = store.folder / f"training-{name}-{settings.steps}"
        begun = _checkpoint(folder)
    return folder, begun


def _checkpoint(folder: Path) -> "Checkpoint | None":
    from ...hollow_core.training.checkpoint import Checkpoint
    from ...hollow_core.training.train import CHECKPOINT

    path = folder / CHECKPOINT
    return Checkpoint.load(path) if path.exists() else None
