"""Pictures of the subject's class for prior preservation, drawn by the base model itself and kept as latents."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, takewhile
from pathlib import Path

import torch

from ..files import read_safetensors, write_safetensors
from ..models.base_model import visiting
from ..models.model import Model
from ..nets.residency import Bits
from ..progress import Clock, Stop, Stopped, Watch
from .sample import SampleSettings, draw, encode_guided, slices


def class_latents(
    model: Model,
    asked: Sequence[tuple[str, tuple[int, int]]],
    folder: Path,
    *,
    made_by: str,
    base_bits: Bits | None = None,
    seed: int = 0,
    steps: int = 30,
    together: int = 1,
    device: torch.device | str | None = None,
    progress: Watch | None = None,
    stop: Stop | None = None,
) -> list[torch.Tensor]:
    """Scaled latents (1, channels, height/8, width/8), one sampled for each generic prompt and size, (height, width) in
    pixels, that is `asked`.

    Each is a file in `folder`, so that an interrupted run goes on; those of another model, prompt, seed or size stay
    beside them. Fewer come back when `stop` says so, which is asked at each denoising step. `together` of one size are
    drawn at once. `made_by` names the model, as `model_id` does before it is quantised to `base_bits`. Text encoders
    and U-Net visit `device` in turn; None leaves them where they are. Raises HollowError for a damaged file.
    """
    common = {"model": made_by, "base_bits": str(base_bits or ""), "steps": str(steps), "seed": str(seed)}
    made_for = [{**common, "resolution": _in_words(size), "prompt": prompt} for prompt, size in asked]
    files, latents = [], {}
    for index, what in enumerate(made_for):
        file, found = _file(folder, index, what)
        files.append(file)
        if found is not None:
            latents[index] = found
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
            seeds = [seed * 1_000_003 + index for index in few]
            try:
                drawn = draw(model, text, seeds, replace(settings, size=size), stop=stop).cpu()
            except Stopped:
                break
            for index, one in zip(few, drawn.split(1), strict=True):
                write_safetensors(files[index], {"latents": one}, made_for[index])
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


def _file(folder: Path, index: int, made_for: Mapping[str, str]) -> tuple[Path, torch.Tensor | None]:
    """Where a picture is, or is to be, and its latents if they are there: behind its number, where another has that
    name, stands what it is made for."""
    plain = folder / f"class-{index:05}.safetensors"
    name = hashlib.sha256(json.dumps(made_for, sort_keys=True).encode()).hexdigest()[:12]
    own = plain.with_stem(f"{plain.stem}-{name}")
    for path in filter(Path.exists, (own, plain)):
        tensors, metadata = read_safetensors(path)
        if all(metadata.get(key, value) == value for key, value in made_for.items()):
            return path, tensors["latents"]
    return own if plain.exists() else plain, None
