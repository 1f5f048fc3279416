"""Milliseconds: of a training step, of a record, of a sampler's step."""

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from hollow_core.lora.layers import add_lora, lora_parameters
from hollow_core.lora.metadata import recipe_for
from hollow_core.memory.setting import Setting
from hollow_core.memory.stages import OneRecord
from hollow_core.nets.conditioning import Conditioning
from hollow_core.nets.network import Network, at_cut
from hollow_core.progress import Progress
from hollow_core.sampling.sample import SampleSettings, draw
from hollow_core.training.precompute import Example, precompute
from hollow_core.training.settings import DTYPES
from hollow_core.training.store import SHARD
from hollow_core.training.train import train

from .measurement import Figures
from .memory import peak
from .models import Shape, give_weights, random_inputs, scramble


class Extent(NamedTuple):
    """How much of it is timed."""

    warm_up: int = 5
    """Training steps before those that are."""
    steps: int = 20
    """Training steps."""
    records: int = 32
    drawn: int = 12
    """Steps of a sampler, a multiple of 1, 2 and 3."""
    repeats: int = 3
    """Of these."""


def measure_training(shape: Shape, setting: Setting, extent: Extent, device: torch.device) -> Figures:
    """Peak GiB and the median of a step, what of it is spent outside of the U-Net's forward and backward pass, and how
    often Python waits for the device in one, as CUDA counts it."""
    model = shape.outline(DTYPES[setting.training.precision])
    give_weights(device, at_cut(model.network, setting.cut, None).module)
    setting.keep_small(model, device)
    store = OneRecord(model, setting)
    scramble(*store.inputs(0))
    network = at_cut(model.network, setting.cut, range(setting.samples))
    del model
    settings = replace(setting.training, steps=extent.warm_up + extent.steps)
    figures: Figures = {}
    moments: list[float] = []
    waits: int | None = None

    def watch(done: Progress) -> None:
        nonlocal waits
        moments.append(time.perf_counter())  # a step waits for the device once, and no more here
        if device.type == "cuda" and done.step == extent.warm_up - 2:
            told.clear()
            torch.cuda.set_sync_debug_mode("warn")
        if device.type == "cuda" and done.step == extent.warm_up - 1:
            torch.cuda.set_sync_debug_mode("default")
            waits = sum("synchronizing CUDA operation" in str(warning.message) for warning in told)

    with TemporaryDirectory() as folder, peak("train", device, figures), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = train(network, store.schedule, store, settings, folder=folder, progress=watch)
    if result.stopped != "finished":
        raise RuntimeError(f"The training ended with a {result.stopped} after {result.steps} steps.")
    step = median(1000 * (after - before) for before, after in pairwise(moments[extent.warm_up - 1 :]))
    alone = _unet_alone(network, store, settings.batch, min(settings.batch, settings.together), extent, device)
    return figures | {"step, ms": step, "outside of the U-Net, ms": step - alone, "waits a step": waits}


def _unet_alone(
    network: Network, store: OneRecord, batch: int, together: int, extent: Extent, device: torch.device
) -> float:
    """Median milliseconds of the U-Net's forward and backward passes of a step's `batch` records, so many together."""
    record, (latents, prompt) = store.record(0), store.inputs(0)
    noisy = torch.cat([record.noisy(store.schedule, latents)[0]] * together).to(device, network.dtype)
    prompts = Conditioning.batch([prompt] * together).to(device, network.dtype)
    stored = {name: torch.cat([part] * together).to(device, network.dtype) for name, part in record.stored.items()}
    found = []
    for number in range(extent.warm_up + extent.steps):
        for matrix in lora_parameters(network.module):
            matrix.grad = None
        began = _now(device)
        for _ in range(batch // together):
            prediction = network.predict(noisy, [record.timestep] * together, prompts, stored)
            prediction.backward(torch.ones_like(prediction))
        if number >= extent.warm_up:
            found.append(1000 * (_now(device) - began))
    return median(found)


def measure_precompute(shape: Shape, setting: Setting, extent: Extent, device: torch.device) -> Figures:
    """Peak GiB, and how many records a second the base path leaves, as many at once as train together; they are
    written to disk, and there are more than are timed."""
    assert setting.cut is not None
    model = shape.outline(DTYPES[setting.training.precision])
    give_weights(device, model.network.base(setting.cut).module)
    latents, prompt = random_inputs(model)
    example = Example(latents, prompt, prompt, "a photo of a sks dog", "a photo of a dog")
    last = SHARD + extent.records
    moments: dict[int, float] = {}

    def watch(done: Progress) -> None:
        if done.step in (SHARD, last):
            moments[done.step] = _now(device)

    figures: Figures = {}
    with TemporaryDirectory() as folder, peak("precompute", device, figures):
        precompute(
            model.network,
            model.schedule,
            [example],
            Path(folder),
            cut=setting.cut,
            samples=last,
            dtype=setting.store_dtype or model.network.record_dtype,
            together=setting.training.together,
            made_by="random weights",
            progress=watch,
        )
    return figures | {"records a second": extent.records / (moments[last] - moments[SHARD])}


def measure_sampling(
    shape: Shape, setting: Setting, refresh: int | None, extent: Extent, device: torch.device
) -> Figures:
    """A step of DDIM under classifier-free guidance, with a LoRA: on two paths, the first of them at every
    `refresh`-th step, or with None on one."""
    model = shape.outline(DTYPES[setting.training.precision])
    give_weights(device, model.unet)
    add_lora(at_cut(model.network, setting.cut, None).module, setting.training.rank, generator=torch.Generator())
    prompt = random_inputs(model)[1].to(device, DTYPES[setting.training.precision])
    parts = {"prompt_embeds": prompt.encoder_hidden_states, "pooled_prompt_embeds": prompt.text_embeds}
    text: dict[str, Any] = {name: part for name, part in parts.items() if part is not None}
    text |= {f"negative_{name}": part for name, part in text.items()}
    recipe, generic = None, None
    if refresh is not None:
        recipe, generic = recipe_for(setting.cut, "sks", "dog", model.schedule.prediction.name), prompt

    def drawing(steps: int) -> Callable[[], object]:
        settings = SampleSettings(steps=steps, size=(model.resolution, model.resolution), refresh=refresh or 1)
        return lambda: draw(model, text, [0], settings, recipe, generic)

    _seconds(drawing(2), device)
    more = [_seconds(drawing(1 + extent.drawn), device) - _seconds(drawing(1), device) for _ in range(extent.repeats)]
    return {"sampler step, ms": 1000 * median(more) / extent.drawn}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    began = _now(device)
    run()
    return _now(device) - began


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
