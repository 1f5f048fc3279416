"""The peak of each stage, and what dry runs say of it. Only what a stage has on the device is ever there."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image

from hollow_core.data.images import TrainingImage
from hollow_core.data.prompts import personal_prompt
from hollow_core.lora.layers import add_lora
from hollow_core.lora.metadata import recipe_for
from hollow_core.memory import dry_run
from hollow_core.memory.planner import GIB, Planner
from hollow_core.memory.setting import Setting
from hollow_core.models.base_model import BaseModel, decode_images, encode_images, encode_prompt, keep_small
from hollow_core.nets.network import at_cut
from hollow_core.nets.residency import stream
from hollow_core.sampling.sample import SampleSettings, draw, encode_guided
from hollow_core.training.precompute import Example, run_base
from hollow_core.training.settings import DTYPES
from hollow_core.training.store import Record

from .measurement import Figures
from .models import Shape, give_weights, random_inputs

PASSES = 2  # after which the fullest moment was seen: streaming sends ahead from the second on


@contextmanager
def peak(name: str, device: torch.device, figures: Figures) -> Iterator[None]:
    """Writes down the most that the tensors of the device took at once, inside: as PyTorch's allocator gives it out,
    as it was asked for, and with what it keeps. A second stage of the name counts where it takes more."""
    free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield
    stats = torch.cuda.memory_stats(device) if device.type == "cuda" else {}
    for figure, counter in (
        (f"{name}, GiB", "allocated"),
        (f"({name}, asked for, GiB)", "requested"),
        (f"({name}, with what is kept for later, GiB)", "reserved"),
    ):
        most = max(figures.get(figure) or 0.0, stats.get(f"{counter}_bytes.all.peak", 0) / GIB)
        figures[figure] = most if stats else None


def free(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
        torch.cuda.empty_cache()


def workspace(device: torch.device) -> int:
    """Bytes that cuBLAS gets from PyTorch on a thread: more on newer GPUs."""
    matrix = torch.ones(64, 64, device=device)
    free(device)
    before = torch.cuda.memory_allocated(device)
    torch.mm(matrix, matrix, out=torch.empty_like(matrix))
    return torch.cuda.memory_allocated(device) - before


def begin_predicting(of_cublas: int) -> None:
    """In a process for dry runs: it keeps out of the way of what is measured, and counts this GPU's `workspace`."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.nice(10)
    torch.set_num_threads(1)
    dry_run.WORKSPACE = of_cublas


def predicted(shape: Shape, setting: Setting, stages: Sequence[str]) -> Figures:
    """The peaks of these stages, by dry runs."""
    planner = Planner(shape.outline)
    return {f"{stage}, GiB": planner.peak(stage, setting).total / GIB for stage in stages}


BESIDE_TRAINING = ("encode", "precompute", "sample")


def measure_beside_training(shape: Shape, setting: Setting, device: torch.device) -> Figures:
    """The peaks of the stages `BESIDE_TRAINING`."""
    figures: Figures = {}
    for stage in (_encode, _precompute, _sample):
        stage(shape.outline(DTYPES[setting.training.precision]), setting, device, figures)
    return figures


def _encode(model: BaseModel, setting: Setting, device: torch.device, figures: Figures) -> None:
    """A picture, then a prompt; VAE and text encoders are there in turn."""
    side = model.resolution
    picture = TrainingImage(Image.new("RGB", (side, side), "teal"), None, "", (0, 0, side, side))
    give_weights(device, model.vae)
    keep_small(model, device, tiled_vae=setting.tiled_vae)
    with peak("encode", device, figures):
        encode_images(model, [picture])
    model.vae = None
    _give_encoders(model, setting, device)
    with peak("encode", device, figures):
        for _ in range(PASSES):
            encode_prompt(model, _PROMPT, (side, side))


def _give_encoders(model: BaseModel, setting: Setting, device: torch.device) -> None:
    give_weights(device, *model.text_encoders)
    if setting.streaming:
        for encoder in model.text_encoders:
            stream(encoder, device)


def _precompute(model: BaseModel, setting: Setting, device: torch.device, figures: Figures) -> None:
    """Records by the base path, of which alone is there what it passes."""
    if setting.cut is None:
        return
    give_weights(device, model.network.base(setting.cut).module)
    setting.keep_small(model, device)
    base = model.network.base(setting.cut)
    latents, prompt = random_inputs(model)
    example = Example(latents, prompt, prompt, "", "")
    with peak("precompute", device, figures):
        for number in range(PASSES):
            run_base(base, model.schedule, [Record(0, "image", 500, number)], [example])


def _sample(model: BaseModel, setting: Setting, device: torch.device, figures: Figures) -> None:
    """A picture in a few steps, on two paths where something is hollowed; text encoders, U-Net and VAE are there in
    turn."""
    settings = SampleSettings(steps=PASSES, size=(model.resolution, model.resolution))
    recipe = recipe_for(setting.cut, "sks", "dog", model.schedule.prediction.name)
    _give_encoders(model, setting, device)
    with peak("sample", device, figures):
        text = encode_guided(model, _PROMPT, settings)
        generic = None if setting.cut is None else encode_prompt(model, recipe.generic_prompt, settings.size)
    model.text_encoders = ()
    give_weights(device, model.unet)
    setting.keep_small(model, device)
    personal = at_cut(model.network, setting.cut, None).module
    add_lora(personal, setting.training.rank, generator=torch.Generator())
    with peak("sample", device, figures):
        latents = draw(model, text, [0], settings, recipe, generic)
    del personal
    model.unet.to("meta")
    give_weights(device, model.vae)
    with peak("sample", device, figures):
        decode_images(model, [latents])


_PROMPT = personal_prompt("sks", "dog")
