"""Pictures of the subject's class for prior preservation, drawn by the base model itself and kept as latents."""

from collections.abc import Sequence
from pathlib import Path

import torch

from .errors import HollowError
from .files import read_safetensors, write_safetensors
from .models import BaseModel
from .progress import Clock, Stop, Watch


def class_latents(
    model: BaseModel,
    prompts: Sequence[str],
    folder: Path,
    *,
    resolution: int,
    seed: int = 0,
    steps: int = 30,
    progress: Watch | None = None,
    stop: Stop | None = None,
) -> list[torch.Tensor]:
    """Scaled latents (1, channels, height/8, width/8), one sampled for each of the generic `prompts`.

    Each is a file in `folder`, so that an interrupted run goes on; fewer come back when `stop` says so. Raises
    HollowError where `folder` holds latents of another prompt, seed or size.
    """
    pipeline = model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    paths = [folder / f"class-{index:05}.safetensors" for index in range(len(prompts))]
    todo = [path for path in paths if not path.exists()]
    clock, latents = Clock(len(prompts) - len(todo), len(prompts)), []
    for index, (path, prompt) in enumerate(zip(paths, prompts, strict=True)):
        made_for = {"prompt": prompt, "seed": str(seed), "resolution": str(resolution), "steps": str(steps)}
        if path in todo:
            if stop is not None and stop():
                break
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            size = {"height": resolution, "width": resolution}
            drawn = pipeline(prompt, **size, num_inference_steps=steps, generator=generator, output_type="latent")
            write_safetensors(path, {"latents": drawn.images.cpu()}, made_for)
            if progress is not None:
                progress(clock(index + 1))
        tensors, metadata = read_safetensors(path)
        if metadata != made_for:
            raise HollowError(f"{path} was drawn for something else ({metadata}). Delete {folder}, or choose another.")
        latents.append(tensors["latents"])
    return latents
