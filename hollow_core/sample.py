"""Pictures from a base model with a LoRA: on two paths, as an ordinary LoRA, or without it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from .errors import HollowError
from .lora import load_lora_state, remove_lora, set_strength
from .lora_file import LoraFile
from .models import BaseModel, encode_prompt
from .prompts import generic_prompt
from .two_path import two_path


@dataclass(frozen=True)
class SampleSettings:
    """How to sample; the same seed gives the same picture on the same machine."""

    steps: int = 30
    """Denoising steps."""
    guidance: float = 7.5
    """Scale of classifier-free guidance."""
    negative: str = ""
    """The negative prompt."""
    strength: float = 1.0
    """Of the LoRA: 0 is none, 1 as trained."""
    refresh: int = 1
    """Run the base path every n-th step; between, its exit activation is used again."""
    size: tuple[int, int] | None = None
    """(height, width) in pixels; None is the model's native size."""


def sample(
    model: BaseModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SampleSettings = SampleSettings(),
    *,
    lora: LoraFile | None = None,
    single_path: bool = False,
    generic: str | None = None,
    progress: Any = None,
) -> list[Image.Image]:
    """One picture a prompt and seed.

    A LoRA of a hollowed training is used on two paths (Hollowed Net, Sec. 4.3) with its prompt's generic
    form, `generic` if given; any other LoRA, or `single_path`, on the ordinary one.
    """
    pipeline = model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    height, width = settings.size or (model.resolution, model.resolution)
    pictures = []
    with _lora(model, lora, settings.strength):
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True), start=1):
            paths: Any = nullcontext()
            if lora is not None and not single_path and lora.recipe is not None and lora.recipe.cut is not None:
                text = generic_prompt(prompt, lora.recipe.identifier) if generic is None else generic
                paths = two_path(
                    pipeline,
                    cut=lora.recipe.cut,
                    generic=encode_prompt(model, text, (height, width)),
                    strength=settings.strength,
                    refresh=settings.refresh,
                )
            with paths:
                output = pipeline(
                    prompt,
                    height=height,
                    width=width,
                    negative_prompt=settings.negative,
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance,
                    generator=torch.Generator().manual_seed(seed),  # the CPU's: one picture on every device
                )
            pictures.append(output.images[0])
            if progress is not None:
                progress(number, len(prompts))
    return pictures


@contextmanager
def _lora(model: BaseModel, lora: LoraFile | None, strength: float) -> Iterator[None]:
    if lora is None:
        yield
        return
    trained_for = None if lora.recipe is None else lora.recipe.prediction_type
    if trained_for not in (None, model.schedule.config.prediction_type):
        raise HollowError(
            f"The LoRA was trained on a model of prediction type {trained_for}, this one is of "
            f"{model.schedule.config.prediction_type}. Use it with the model it was trained on."
        )
    load_lora_state(model.unet, lora.state, lora.alpha)
    set_strength(model.unet, strength)
    try:
        yield
    finally:
        remove_lora(model.unet)
