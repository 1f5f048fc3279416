"""A training problem small enough to be run many times, and ways to break it off and to fill the disk."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from tiny_unets import make_shallow_unet, make_tiny_conditioning

from hollow_core.nets.network import Network
from hollow_core.nets.schedule import NoiseSchedule
from hollow_core.nets.unet import UNet
from hollow_core.training.precompute import Example, precompute
from hollow_core.training.store import Store


def tiny_schedule(prediction_type: str = "epsilon", **changes: object) -> NoiseSchedule:
    """Stable Diffusion's noise schedule."""
    return NoiseSchedule.from_scheduler(tiny_scheduler(prediction_type, **changes))


def tiny_scheduler(prediction_type: str = "epsilon", **changes: object) -> DDPMScheduler:
    """The same as diffusers has it."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDPMScheduler(**betas, prediction_type=prediction_type, **changes)


def tiny_examples(unet: UNet2DConditionModel, images: int = 2, priors: int = 0, size: int = 8) -> list[Example]:
    """Random latents of "images" under one personal prompt, and of "priors" under the generic one."""
    personal, generic = (make_tiny_conditioning(unet, seed=seed) for seed in (1, 2))
    latents = torch.randn(images + priors, 4, size, size, generator=torch.Generator().manual_seed(3))
    return [
        Example(z, personal, generic, "a photo of a sks dog", "a photo of a dog", kind)
        for z, kind in zip(latents.split(1), ["image"] * images + ["prior"] * priors, strict=True)
    ]


def tiny_beginning(folder: Path, priors: int = 0) -> tuple[Network, NoiseSchedule, Store]:
    """What `train` takes of four records in `folder`: a network of random weights, hollowed at cut 1."""
    unet, schedule = make_shallow_unet("sd15"), tiny_schedule()
    store = precompute(UNet(unet), schedule, tiny_examples(unet, 2, priors), folder, cut=1, samples=4)
    return UNet(unet).hollow(1, range(1000)), schedule, store


def same(state: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Bit by bit."""
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, byte by byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Broken(Exception):
    """What a test raises where power would fail."""


class BreakAt:
    """A `progress` that raises in its n-th call."""

    def __init__(self, call: int) -> None:
        self.left = call

    def __call__(self, progress: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise Broken


class OutOfMemoryAt:
    """A hook of a module, forward or backward, that raises in its n-th call what torch raises on a full GPU."""

    def __init__(self, call: int) -> None:
        self.left = call

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def run_script(script: str, *arguments: object) -> int:
    """Run a Python script in a process of its own, with as many threads as this one: its exit status."""
    tests = Path(__file__).parent
    begin = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
    command = [sys.executable, "-c", begin + script, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}"}).returncode


@contextmanager
def full_disk(limit: int = 0) -> Iterator[None]:
    """While inside, the operating system lets no file grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
