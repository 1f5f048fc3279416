"""Each stage's real code, run once on tensors without data."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor, nn

from ..data.images import TrainingImage
from ..data.prompts import personal_prompt
from ..lora.layers import add_lora, lora_parameters
from ..lora.metadata import recipe_for
from ..models.base_model import decode_images, encode_images, encode_prompt
from ..models.model import Model
from ..nets.conditioning import Conditioning
from ..nets.network import at_cut
from ..nets.residency import away, loaded_bytes
from ..nets.schedule import NoiseSchedule
from ..progress import Progress
from ..sampling.sample import SampleSettings, draw, encode_guided
from ..training.precompute import Example, run_base
from ..training.store import SHARD, Fingerprint, Record, Store
from ..training.train import train
from .dry_run import DryRun, Peak
from .setting import Setting


def _encode(model: Model, setting: Setting) -> tuple[Peak, int]:
    """A picture, then a prompt, and one of the class: VAE, text encoders and U-Net are there in turn, as in
    `personalize`."""
    width, height = size = setting.measured(model.resolution)
    picture = TrainingImage(Image.new("RGB", size), None, "", (0, 0, *size))
    assert model.vae is not None
    with DryRun() as images:
        images.hold("weights", model.vae)
        encode_images(model, [picture])
    prompt, settings = personal_prompt("sks", "dog"), SampleSettings(steps=_passes(setting), size=(height, width))
    with DryRun() as prompts:
        _hold(prompts, *model.text_encoders)
        encode_prompt(model, prompt, settings.size)
    loaded = _loaded(model)
    if not setting.class_images:
        return _in_turn(images, prompts, main_memory=loaded)
    with DryRun() as guided:
        _hold(guided, *model.text_encoders)
        text = encode_guided(model, prompt, settings)
    with DryRun() as drawing:
        _hold(drawing, model.network.module)
        together = setting.training.together
        draw(model, model.batch_guided([text] * together), [0] * together, settings)
    return _in_turn(images, prompts, guided, drawing, main_memory=loaded)


def _precompute(model: Model, setting: Setting) -> tuple[Peak, int]:
    """Records by the base path, of which alone is there what it passes; an ordinary LoRA needs none."""
    latents, prompt = _inputs(model, setting)
    example = Example(latents, prompt, prompt, "", "")
    with DryRun() as run:
        if setting.cut is not None:
            base = model.network.base(setting.cut)
            _hold(run, base.module)
            together = setting.training.together
            for _ in range(_passes(setting)):
                run_base(base, model.schedule, [_RECORD] * together, [example] * together)
    # the network as it is when the stage begins, then what is away, and two shards: one is written, one is made
    network, held = _tensors(model.network.module), _record_bytes(model, setting) * 2 * SHARD
    return replace(run.peak(), main_memory=sum(network.values()) + held), run.flops


def _train(model: Model, setting: Setting) -> tuple[Peak, int]:
    """The first steps of `train`, with two parts of the records at most: more are no more memory."""
    training = setting.training
    network = at_cut(model.network, setting.cut, range(setting.samples))
    store = OneRecord(model, setting)
    behind, records = _left(model, setting), _record_bytes(model, setting) * 2 * setting.step_records
    del model
    few = replace(training, batch=min(training.batch, 2 * training.together), save_every=0, zo_timesteps=None)

    def stop_there(done: Progress) -> None:
        if done.step == _passes(setting):
            raise _EnoughSteps

    with TemporaryDirectory() as folder, DryRun() as run, suppress(_EnoughSteps):
        _hold(run, network.module)
        train(network, store.schedule, store, few, folder=folder, progress=stop_there)
    lora = sum(matrix.nbytes for matrix in lora_parameters(network.module))  # copied before each step, and after
    return (
        replace(run.peak(), main_memory=behind + 2 * lora + records),
        run.flops * training.batch // (few.batch * _passes(setting)),
    )


def _sample(model: Model, setting: Setting) -> tuple[Peak, int]:
    """A denoising step with classifier-free guidance, on two paths where a U-Net is hollowed, and the picture;
    text encoders, U-Net and VAE are there in turn, as in `sample`."""
    (width, height), training = setting.measured(model.resolution), setting.training
    settings = SampleSettings(steps=_passes(setting), size=(height, width))
    prompt = personal_prompt("sks", "dog")
    recipe = recipe_for(setting.cut, "sks", "dog", model.schedule.prediction.name)
    network, loaded = at_cut(model.network, setting.cut, None), _loaded(model)
    add_lora(
        network.module,
        training.rank,
        targets=training.targets,
        within=network.within,
        dora=training.dora,
        generator=torch.Generator(),
    )
    assert model.vae is not None
    with DryRun() as prompts:
        _hold(prompts, *model.text_encoders)
        text = encode_guided(model, prompt, settings)
        generic = encode_prompt(model, recipe.generic_prompt, settings.size) if recipe.two_paths else None
    with DryRun() as drawing:
        _hold(drawing, model.network.module)
        drawing.name("lora", lora_parameters(model.network.module))
        latents = draw(model, text, [0], settings, None if generic is None else recipe, generic)
    with DryRun() as picture:
        picture.hold("weights", model.vae)
        decode_images(model, [latents])
    return _in_turn(prompts, drawing, picture, main_memory=loaded)


RUNS: dict[str, Callable[[Model, Setting], tuple[Peak, int]]] = {
    "encode": _encode,
    "precompute": _precompute,
    "train": _train,
    "sample": _sample,
}
"""What runs each stage, in their order: its peak, and its operations."""

STAGES = tuple(RUNS)


def _in_turn(*runs: DryRun, main_memory: int) -> tuple[Peak, int]:
    """Of what happens one after the other."""
    fullest = max((run.peak() for run in runs), key=lambda peak: peak.total)
    return replace(fullest, main_memory=main_memory), sum(run.flops for run in runs)


def _loaded(model: Model) -> int:
    """Bytes of a whole model as it is loaded into main memory, from where its parts visit the device."""
    assert model.vae is not None
    return sum(loaded_bytes(part) for part in (model.network.module, model.vae, *model.text_encoders))


def _left(model: Model, setting: Setting) -> int:
    """Bytes of a network that are in main memory when training begins: what is away, and what precomputing, which had
    the rest on the device, did not run."""
    network = at_cut(model.network, setting.cut, range(setting.samples)).module
    elsewhere = {id(tensor) for tensor in away(network)}
    there = set() if setting.cut is None else _tensors(model.network.base(setting.cut).module).keys() - elsewhere
    return sum(size for tensor, size in _tensors(network).items() if tensor not in there)


def _tensors(module: nn.Module) -> dict[int, int]:
    """Bytes of each parameter and buffer, by identity."""
    return {id(tensor): tensor.nbytes for tensor in (*module.parameters(), *module.buffers())}


def _record_bytes(model: Model, setting: Setting) -> int:
    if setting.cut is None:
        return 0
    size = _inputs(model, setting)[0].shape[-2:]
    shapes = model.network.stored_shapes(setting.cut, *size).values()
    return sum(map(math.prod, shapes)) * (setting.store_dtype or model.network.record_dtype).itemsize


def _hold(run: DryRun, *modules: nn.Module) -> None:
    """Count what of them is on the device."""
    for module in modules:
        elsewhere = {id(tensor) for tensor in away(module)}
        run.name("weights", [each for each in (*module.parameters(), *module.buffers()) if id(each) not in elsewhere])


def _passes(setting: Setting) -> int:
    """After which the fullest moment was seen: streaming sends ahead from the second on."""
    return 2 if setting.streaming or setting.stream_middle else 1


def _inputs(model: Model, setting: Setting) -> tuple[Tensor, Conditioning]:
    """Latents and a prompt on the CPU, as a store hands them out."""
    width, height = (side // model.pixels_per_latent for side in setting.measured(model.resolution))
    return model.network.inputs(height, width)


_RECORD = Record(image=0, kind="image", timestep=0, noise_seed=0)


class _EnoughSteps(Exception):
    """Enough was seen."""


class OneRecord(Store):
    """A store of one record, on no disk, of zeros: enough for `train` to run a step with this setting."""

    missing: list[int] = []  # noqa: RUF012  # a property of Store

    def __init__(self, model: Model, setting: Setting) -> None:
        self.schedule: NoiseSchedule = model.schedule
        dtype = setting.store_dtype or model.network.record_dtype
        fingerprint = Fingerprint("", setting.cut, self.schedule.id, 1, 0, str(dtype), ["image"], [], [], [])
        super().__init__(Path(), fingerprint, [_RECORD])
        self._given = _inputs(model, setting)
        if setting.cut is not None:
            shapes = model.network.stored_shapes(setting.cut, *self._given[0].shape[-2:])
            self._stored = {name: torch.zeros(1, *shape, dtype=dtype) for name, shape in shapes.items()}

    def record(self, index: int) -> Record:
        return _RECORD if self.cut is None else _RECORD._replace(stored=self._stored)

    def inputs(self, image: int) -> tuple[Tensor, Conditioning]:
        return self._given

    def check(self, schedule: NoiseSchedule) -> None:
        """There is no file to check."""
