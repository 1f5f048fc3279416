"""Pictures of the subject's class for prior preservation, drawn by the base model itself and kept as latents."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, takewhile
from pathlib import Path

import torch

from ..errors import HollowError
from ..files import digest, read_safetensors, write_safetensors
from ..models.base_model import visiting
from ..models.model import Model
from ..progress import Clock, Stop, Watch
from ..seeds import SEEDS, check_seed
from .sample import SampleSettings, draw, encode_guided, slices

_DIGEST = "digest"  # of the metadata, where older files have none
_log = logging.getLogger(__name__)


def class_latents(
    model: Model,
    asked: Sequence[tuple[str, tuple[int, int]]],
    folder: Path,
    *,
    made_by: str,
    seed: int = 0,
    steps: int = 30,
    together: int = 1,
    device: torch.device | str | None = None,
    progress: Watch | None = None,
    stop: Stop | None = None,
) -> list[torch.Tensor]:
    """Scaled latents (1, channels, height/8, width/8), one sampled for each generic prompt and size, (height, width) in
    pixels, that is `asked`.

    Each is a file in `folder`, so that an interrupted run goes on; fewer come back when `stop` says so. `together` of
    one size are drawn at once. `made_by` names the model, as `model_id` does before it is quantised. Text encoders and
    U-Net visit `device` in turn; None leaves them where they are. A file that is damaged is named in the log and drawn
    again. Raises HollowError for a number that is no seed, where `folder` holds latents of another model, prompt, seed
    or size, and where what is drawn is not finite, which is not kept.
    """
    check_seed(seed)
    common = {"model": made_by, "steps": str(steps), "seed": str(seed)}
    files = [
        (folder / f"class-{index:05}.safetensors", {**common, "resolution": _in_words(size), "prompt": prompt})
        for index, (prompt, size) in enumerate(asked)
    ]
    latents = {}
    for index, (path, made_for) in enumerate(files):
        height, width = (side // model.pixels_per_latent for side in asked[index][1])
        if path.exists() and (kept := _read(path, made_for, (height, width))) is not None:
            latents[index] = kept
    todo = sorted((index for index in range(len(files)) if index not in latents), key=lambda index: asked[index][1])
    settings = SampleSettings(steps=steps, together=together)
    texts = {}
    if todo:
        with visiting(device, *model.text_encoders):
            wanted = dict.fromkeys(asked[index][0] for index in todo)
            texts = {prompt: encode_guided(model, prompt, settings) for prompt in wanted}
    clock = Clock(len(latents), len(files))
    with visiting(device if todo else None, model.network.module):
        for size, few in _alike(todo, [size for _, size in asked], together):
            if stop is not None and stop():
                break
            text = model.batch_guided([texts[asked[index][0]] for index in few])
            seeds = [(seed * 1_000_003 + index) % SEEDS for index in few]
            drawn = draw(model, text, seeds, replace(settings, size=size)).cpu()
            for index, one in zip(few, drawn.split(1), strict=True):
                path, made_for = files[index]
                if not one.isfinite().all():
                    precision = str(model.network.dtype).removeprefix("torch.")
                    raise HollowError(
                        f"The class picture {path.name}, {asked[index][0]!r}, is not finite as the model draws it in "
                        f"{precision}. Take another precision, or check the model."
                    )
                write_safetensors(path, {"latents": one}, {**made_for, _DIGEST: digest(one)})
                latents[index] = one
                if progress is not None:
                    progress(clock(len(latents)))
    return [latents[index] for index in takewhile(latents.__contains__, range(len(files)))]


def _alike(
    todo: Sequence[int], sizes: Sequence[tuple[int, int]], together: int
) -> Iterator[tuple[tuple[int, int], Sequence[int]]]:
    """Of `todo`, in order of size, up to so many of one size."""
    for size, alike in groupby(todo, sizes.__getitem__):
        indices = list(alike)
        yield from ((size, indices[part]) for part in slices(0, len(indices), together))


def _in_words(size: tuple[int, int]) -> str:
    """ "512", of a picture that is no square "512x768"."""
    return str(size[0]) if size[0] == size[1] else f"{size[1]}x{size[0]}"


def _read(path: Path, made_for: Mapping[str, str], shape: tuple[int, int]) -> torch.Tensor | None:
    """The latents (1, channels, *shape) in a file; None where they are others than were written, or not finite."""
    try:
        tensors, metadata = read_safetensors(path)
    except HollowError:
        tensors, metadata = {}, {}
    if other := _differences(metadata, made_for):
        raise HollowError(f"{path} was drawn for something else ({other}). Delete {path.parent}, or choose another.")
    latents = tensors.get("latents")
    if latents is not None and latents.dim() == 4 and latents.shape[2:] == shape and latents.isfinite().all():
        found = digest(latents)
        if metadata.get(_DIGEST, found) == found:
            return latents
    _log.warning("%s is damaged. It is drawn again.", path)
    return None


def _differences(found: Mapping[str, str], asked: Mapping[str, str]) -> str:
    other = [name for name in asked if found.get(name, asked[name]) != asked[name]]
    if "model" in other:
        return "another model, or the same in another precision"
    return ", ".join(f"{name} {found.get(name)!r}, not {asked[name]!r}" for name in other)
