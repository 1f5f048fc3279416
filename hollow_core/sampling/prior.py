"""Pictures of the subject's class for prior preservation, drawn by the base model itself and kept as latents."""

import hashlib
import json
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
from ..nets.residency import Bits
from ..progress import Clock, Stop, Stopped, Watch
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
    and U-Net visit `device` in turn; None leaves them where they are. A file that is damaged is named in the log and
    drawn again. Raises HollowError for a number that is no seed, and where what is drawn is not finite, which is not
    kept.
    """
    check_seed(seed)
    common = {"model": made_by, "base_bits": str(base_bits or ""), "steps": str(steps), "seed": str(seed)}
    made_for = [{**common, "resolution": _in_words(size), "prompt": prompt} for prompt, size in asked]
    files, latents = [], {}
    for index, what in enumerate(made_for):
        height, width = (side // model.pixels_per_latent for side in asked[index][1])
        file, found = _file(folder, index, what, (height, width))
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
            seeds = [(seed * 1_000_003 + index) % SEEDS for index in few]
            try:
                drawn = draw(model, text, seeds, replace(settings, size=size), stop=stop).cpu()
            except Stopped:
                break
            for index, one in zip(few, drawn.split(1), strict=True):
                if not one.isfinite().all():
                    precision = str(model.network.dtype).removeprefix("torch.")
                    raise HollowError(
                        f"The class picture {files[index].name}, {asked[index][0]!r}, is not finite as the model draws "
                        f"it in {precision}. Take another precision, or check the model."
                    )
                write_safetensors(files[index], {"latents": one}, {**made_for[index], _DIGEST: digest(one)})
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


def _file(
    folder: Path, index: int, made_for: Mapping[str, str], shape: tuple[int, int]
) -> tuple[Path, torch.Tensor | None]:
    """Where a picture is, or is to be, and its latents (1, channels, *shape) if they are there: where another has its
    number for a name, a digest of what it is made for stands behind."""
    plain = folder / f"class-{index:05}.safetensors"
    name = hashlib.sha256(json.dumps(made_for, sort_keys=True).encode()).hexdigest()[:12]
    own = plain.with_stem(f"{plain.stem}-{name}")
    for path in filter(Path.exists, (own, plain)):
        try:
            tensors, metadata = read_safetensors(path)
        except HollowError:
            tensors, metadata = {}, {}
        if all(metadata.get(key, value) == value for key, value in made_for.items()):
            return path, _whole(path, tensors, metadata, shape)
    return own if plain.exists() else plain, None


def _whole(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], shape: tuple[int, int]
) -> torch.Tensor | None:
    """The latents of a file; None where they are others than were written, or not finite."""
    latents = tensors.get("latents")
    if latents is not None and latents.dim() == 4 and latents.shape[2:] == shape and latents.isfinite().all():
        found = digest(latents)
        if metadata.get(_DIGEST, found) == found:
            return latents
    _log.warning("%s is damaged. It is drawn again.", path)
    return None
