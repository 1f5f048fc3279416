"""Pictures of the subject's class for prior preservation, drawn by the base model itself and kept as latents."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path

import torch

from ..errors import HollowError
from ..files import read_safetensors, write_safetensors
from ..models.base_model import BaseModel, visiting
from ..progress import Clock, Stop, Watch
from .sample import SampleSettings, batched, draw, encode_guided, slices


def class_latents(
    model: BaseModel,
    prompts: Sequence[str],
    folder: Path,
    *,
    made_by: str,
    resolution: int,
    seed: int = 0,
    steps: int = 30,
    together: int = 1,
    device: torch.device | str | None = None,
    progress: Watch | None = None,
    stop: Stop | None = None,
) -> list[torch.Tensor]:
    """Scaled latents (1, channels, height/8, width/8), one sampled for each of the generic `prompts`.

    Each is a file in `folder`, so that an interrupted run goes on; fewer come back when `stop` says so. `together` are
    drawn at once. `made_by` names the model, as `model_id` does before it is quantised. Text encoders and U-Net visit
    `device` in turn; None leaves them where they are. Raises HollowError where `folder` holds latents of another model,
    prompt, seed or size.
    """
    settings = SampleSettings(steps=steps, size=(resolution, resolution), together=together)
    common = {"model": made_by, "resolution": str(resolution), "steps": str(steps), "seed": str(seed)}
    files = [(folder / f"class-{index:05}.safetensors", {**common, "prompt": p}) for index, p in enumerate(prompts)]
    latents = {index: _read(path, made_for) for index, (path, made_for) in enumerate(files) if path.exists()}
    todo = [index for index in range(len(files)) if index not in latents]
    texts = {}
    if todo:
        with visiting(device, *model.text_encoders):
            wanted = dict.fromkeys(prompts[index] for index in todo)
            texts = {prompt: encode_guided(model, prompt, settings) for prompt in wanted}
    clock = Clock(len(latents), len(files))
    with visiting(device if todo else None, model.unet):
        for few in (todo[part] for part in slices(0, len(todo), together)):
            if stop is not None and stop():
                break
            text = batched([texts[prompts[index]] for index in few])
            drawn = draw(model, text, [seed * 1_000_003 + index for index in few], settings).cpu()
            for index, one in zip(few, drawn.split(1), strict=True):
                path, made_for = files[index]
                write_safetensors(path, {"latents": one}, made_for)
                latents[index] = one
                if progress is not None:
                    progress(clock(len(latents)))
    return [latents[index] for index in takewhile(latents.__contains__, range(len(files)))]


def _read(path: Path, made_for: Mapping[str, str]) -> torch.Tensor:
    tensors, metadata = read_safetensors(path)
    if other := _differences(metadata, made_for):
        raise HollowError(f"{path} was drawn for something else ({other}). Delete {path.parent}, or choose another.")
    return tensors["latents"]


def _differences(found: Mapping[str, str], asked: Mapping[str, str]) -> str:
    other = [name for name in asked if found.get(name, asked[name]) != asked[name]]
    if "model" in other:
        return "another model, or the same in another precision"
    return ", ".join(f"{name} {found.get(name)!r}, not {asked[name]!r}" for name in other)
