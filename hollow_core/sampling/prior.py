"""Pictures of the subject's class for prior preservation, drawn by the base model itself and kept as latents."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..errors import HollowError
from ..files import read_safetensors, write_safetensors
from ..models.base_model import BaseModel, visiting
from ..progress import Clock, Stop, Watch
from .sample import SampleSettings, draw, encode_guided


def class_latents(
    model: BaseModel,
    prompts: Sequence[str],
    folder: Path,
    *,
    made_by: str,
    resolution: int,
    seed: int = 0,
    steps: int = 30,
    device: torch.device | str | None = None,
    progress: Watch | None = None,
    stop: Stop | None = None,
) -> list[torch.Tensor]:
    """Scaled latents (1, channels, height/8, width/8), one sampled for each of the generic `prompts`.

    Each is a file in `folder`, so that an interrupted run goes on; fewer come back when `stop` says so. `made_by` names
    the model, as `model_id` does before it is quantised. Text encoders and U-Net visit `device` in turn; None leaves
    them where they are. Raises HollowError where `folder` holds latents of another model, prompt, seed or size.
    """
    settings = SampleSettings(steps=steps, size=(resolution, resolution))
    paths = {folder / f"class-{index:05}.safetensors": prompt for index, prompt in enumerate(prompts)}
    todo = {path: prompt for path, prompt in paths.items() if not path.exists()}
    texts = {}
    if todo:
        with visiting(device, *model.text_encoders):
            texts = {prompt: encode_guided(model, prompt, settings) for prompt in dict.fromkeys(todo.values())}
    done = len(paths) - len(todo)
    clock, latents = Clock(done, len(paths)), []
    common = {"model": made_by, "resolution": str(resolution), "steps": str(steps), "seed": str(seed)}
    with visiting(device if todo else None, model.unet):
        for index, (path, prompt) in enumerate(paths.items()):
            made_for = {**common, "prompt": prompt}
            if path in todo:
                if stop is not None and stop():
                    break
                drawn = draw(model, texts[prompt], [seed * 1_000_003 + index], settings)
                write_safetensors(path, {"latents": drawn.cpu()}, made_for)
                done += 1
                if progress is not None:
                    progress(clock(done))
            tensors, metadata = read_safetensors(path)
            if other := _differences(metadata, made_for):
                raise HollowError(f"{path} was drawn for something else ({other}). Delete {folder}, or choose another.")
            latents.append(tensors["latents"])
    return latents


def _differences(found: Mapping[str, str], asked: Mapping[str, str]) -> str:
    other = [name for name in asked if found.get(name, asked[name]) != asked[name]]
    if "model" in other:
        return "another model, or the same in another precision"
    return ", ".join(f"{name} {found.get(name)!r}, not {asked[name]!r}" for name in other)
