"""Predicts the memory of every stage before anything is loaded, and picks what fits into a budget.

Each stage's real code runs once on tensors without data (`dry_run`), so a prediction cannot rot.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from .activations import Fingerprint, Record, Store, schedule_id
from .blocks import Config, check_cut, exit_shape, leaves_attention, max_cut, removed_fraction
from .cost import inputs
from .dry_run import DryRun, Peak
from .errors import HollowError
from .hollow import Conditioning, head, hollow
from .images import TrainingImage
from .lora import add_lora, lora_parameters
from .lora_metadata import recipe_for
from .models import (
    BaseModel,
    Outlines,
    decode_images,
    encode_images,
    encode_prompt,
    keep_small,
    layout_name,
    outline,
    without_data,
)
from .precompute import Example, check_samples, run_to_exit
from .progress import Progress
from .prompts import personal_prompt
from .residency import Bits, away, stream_middle
from .sample import SampleSettings, draw, encode_guided
from .train import DTYPES, Precision, TrainSettings, check_unfused, train

STAGES = ("encode", "precompute", "train", "sample")

GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """One way to go the whole road. The base is loaded in the precision of `training`."""

    cut: int | None = 3
    """How much to hollow; None trains an ordinary LoRA on the whole U-Net."""
    resolution: int | None = None
    """Side of the pictures in pixels; None is the model's own."""
    samples: int = 200
    """Records in the store."""
    class_images: int = 0
    """Pictures of the class that the base draws, among what is encoded; with any, a step has twice the records."""
    store_dtype: torch.dtype = torch.float16
    """How exit activations are kept."""
    base_bits: Bits | None = None
    """Bits of a weight of the frozen base; None keeps them in the precision."""
    streaming: bool = False
    """The weights of U-Net and text encoders are in main memory and visit the device."""
    stream_middle: bool = False
    """While precomputing, those of the middle are."""
    tiled_vae: bool = False
    """Pictures are encoded and decoded in tiles."""
    training: TrainSettings = field(default_factory=TrainSettings)
    low_resolution: int | None = None
    """Side in pixels of the pictures for BP-low, if the strategy is selective; None is half of the others'."""

    @property
    def step_records(self) -> int:
        """Records that a training step goes through, those of the class included."""
        return self.training.batch * (2 if self.class_images and self.training.prior_weight > 0 else 1)

    def __str__(self) -> str:
        training = self.training
        return f"{'the whole U-Net' if self.cut is None else f'cut {self.cut}'} in " + ", ".join(
            [
                training.precision,
                *([f"gradient checkpointing{_levels(training)}"] if training.gradient_checkpointing else []),
                *([f"{training.together} records at once"] if training.together > 1 else []),
                *([f"{self.base_bits}-bit base"] if self.base_bits else []),
                *(["streaming"] if self.streaming else []),
                *(["streamed middle"] if self.stream_middle else []),
                *(["tiled VAE"] if self.tiled_vae else []),
                *(["bf16 LoRA"] if training.lora_precision == "bf16" else []),
                *(["8-bit AdamW"] if training.optimizer == "adamw8bit" else []),
                *(["fused backward"] if training.fused_backward else []),
            ]
        )


@dataclass(frozen=True)
class Prediction:
    """What a setting will need."""

    setting: Setting
    stages: Mapping[str, Peak]
    """The peak of each stage of `STAGES`."""
    store_bytes: int
    """Of the exit activations on the disk."""
    step_flops: int
    """Floating-point operations of a training step, those included that recompute what was not kept."""

    @property
    def hungriest(self) -> str:
        """The stage with the highest peak on the way to a LoRA: any but sampling."""
        return max((stage for stage in ROAD if stage in self.stages), key=lambda stage: self.stages[stage].total)

    @property
    def bytes(self) -> int:
        """That peak."""
        return self.stages[self.hungriest].total

    def row(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        training = self.setting.training
        return {
            "cut": self.setting.cut,
            "precision": training.precision,
            "gradient_checkpointing": training.gradient_checkpointing,
            "checkpoint_levels": training.checkpoint_levels,
            "base_bits": self.setting.base_bits,
            "streaming": self.setting.streaming,
            "stream_middle": self.setting.stream_middle,
            "tiled_vae": self.setting.tiled_vae,
            "lora_precision": training.lora_precision,
            "optimizer": training.optimizer,
            "fused_backward": training.fused_backward,
            "rank": training.rank,
            "batch": training.batch,
            "together": training.together,
            "bytes": self.bytes,
            "stages": {name: {"total": peak.total, **peak.bytes} for name, peak in self.stages.items()},
            "store_bytes": self.store_bytes,
            "step_flops": self.step_flops,
        }


ROAD = STAGES[:-1]
"""The stages that make a LoRA; a budget is for these."""


@dataclass(frozen=True)
class Fit:
    """What `Planner.fit` picked, and what was given up for it, in words."""

    prediction: Prediction
    gave_up: tuple[str, ...]


class Planner:
    """Predictions for one model: a layout ("sd15", "sd21", "sdxl") or a path, as for `models.outline`; one that is
    loaded, by its `models.outlines`; or the config of a U-Net whose pictures and prompts others encode and draw, with
    the stages precompute and train alone.

    Raises HollowError as `outline` does.
    """

    def __init__(self, model: str | Outlines | Config) -> None:
        self._outline: Outlines
        if isinstance(model, str):
            self._outline = partial(outline, model)
        else:
            self._outline = model if callable(model) else partial(_outline_unet, model)
        self._runs: dict[tuple[str, Setting], tuple[Peak, int]] = {}  # what was run once
        known = self._outline(torch.float32)
        self.stages = STAGES if known.vae is not None else ("precompute", "train")
        self.road = [stage for stage in ROAD if stage in self.stages]
        self._unet = known.unet
        self.config, self.resolution = known.unet.config, known.resolution
        self._pixels = known.resolution // self.config.sample_size  # a side of a latent

    def predict(self, setting: Setting) -> Prediction:
        """Of every stage. Raises HollowError for a cut, a resolution or a number of records that cannot be."""
        self._check(setting)
        peaks = {stage: self._run(stage, setting)[0] for stage in self.stages}
        return Prediction(setting, peaks, self.store_bytes(setting), self.step_flops(setting))

    def step_flops(self, setting: Setting) -> int:
        """Operations of a training step. Raises HollowError as `predict` does."""
        self._check(setting)
        return self._run("train", setting)[1]

    def store_bytes(self, setting: Setting) -> int:
        """Of the exit activations on the disk. Raises HollowError as `predict` does."""
        side = self._check(setting) // self._pixels
        if setting.cut is None:
            return 0
        channels, height, width = exit_shape(self.config, setting.cut, side, side)
        return setting.samples * channels * height * width * setting.store_dtype.itemsize

    def peak(self, stage: str, setting: Setting) -> Peak:
        """Of one stage of `STAGES` only. Raises HollowError as `predict` does."""
        self._check(setting)
        return self._run(stage, setting)[0]

    def cuts(self) -> list[int]:
        """Those worth a look: they leave at least 15 % of the U-Net, as the paper's do, and attention in it."""
        return [
            cut
            for cut in range(max_cut(self.config) + 1)
            if leaves_attention(self.config, cut) and removed_fraction(self._unet, cut) <= 0.85
        ]

    def fit(
        self,
        budget: int,
        setting: Setting,
        *,
        precisions: Iterable[Precision] = ("fp32", "bf16"),
        cuts: Sequence[int | None] | None = None,
    ) -> Fit:
        """The least hollowing, and for it the fastest way, whose stages all stay within `budget` bytes.

        From the whole U-Net on, cut by cut (those of `cuts()`, or `cuts` if given), the ways are tried that give up
        least: `precisions` in their order, then in the smallest of them one record at a time, gradient checkpointing,
        level by level from the outermost, then a base in 8 bits; with a tiled VAE where pictures would not fit
        otherwise, and a streamed middle where precomputing would not. Where no cut fits so, all is streamed: last, as
        it is the slowest, while a cut makes steps faster. All else is as in `setting`. Sampling is not counted, as any
        other tool can draw with the LoRA. Raises HollowError where nothing fits, saying what the smallest would need.
        """
        self._check(setting)
        resident = _ways(setting, tuple(precisions), len(self.config["block_out_channels"]))
        streamed = [replace(resident[-1], streaming=True)]
        cuts = (None, *self.cuts()) if cuts is None else cuts
        for ways, cut in product((resident, streamed), cuts):
            settings = [replace(way, cut=cut) for way in ways]
            if not self._fits(self.eased(settings[-1], budget), budget):  # the smallest of them
                continue
            for tried in (self.eased(setting, budget) for setting in settings):
                if self._fits(tried, budget):
                    return Fit(self.predict(tried), _gave_up(tried, resident[0]))
        least = [replace(streamed[0], cut=cut, tiled_vae=True, stream_middle=False) for cut in cuts]
        encode = self._run("encode", least[0])[0].total if "encode" in self.stages else 0
        smallest, needed = least[0], self._bytes(least[0])
        for other in least[1:]:
            if needed > encode and self._bytes(other) < needed:  # no cut makes encoding smaller
                smallest, needed = other, self._bytes(other)
        stage = max(self.road, key=lambda stage: self._run(stage, smallest)[0].total)
        raise HollowError(
            f"Nothing fits into {budget / GIB:.2f} GiB: the smallest, {smallest}, needs {needed / GIB:.2f} GiB, "
            f"in its stage {stage}."
        )

    def eased(self, setting: Setting, budget: int) -> Setting:
        """The setting with a tiled VAE where encoding, and a streamed middle where precomputing would not stay within
        `budget` bytes without."""
        if "encode" in self.stages and self._run("encode", setting)[0].total > budget:
            setting = replace(setting, tiled_vae=True)
        if not setting.streaming and self._run("precompute", setting)[0].total > budget:
            setting = replace(setting, stream_middle=True)
        return setting

    def _check(self, setting: Setting) -> int:
        """The side of the pictures in pixels."""
        if setting.cut is not None:
            check_cut(self.config, setting.cut)
        side = self.resolution if setting.resolution is None else setting.resolution
        if side < 1 or side % self._pixels:
            raise HollowError(f"The resolution {side} is no multiple of {self._pixels} pixels. Take 512, 768 or 1024.")
        if setting.step_records > setting.training.batch:
            check_unfused(setting.training)
        check_samples(setting.samples)
        return side

    def _fits(self, setting: Setting, budget: int) -> bool:
        return all(self._run(stage, setting)[0].total <= budget for stage in self.road)

    def _bytes(self, setting: Setting) -> int:
        return max(self._run(stage, setting)[0].total for stage in self.road)

    def _run(self, stage: str, setting: Setting) -> tuple[Peak, int]:
        """Peak and operations of a stage; settings that do not matter to it are one to it."""
        training = setting.training
        if stage != "train":
            training = TrainSettings(precision=training.precision)
            if stage == "sample":
                old = setting.training
                training = replace(training, rank=old.rank, alpha=old.alpha, targets=old.targets)
        setting = replace(
            setting, resolution=setting.resolution or self.resolution, low_resolution=None, training=training
        )
        if stage == "train":  # records of the class are like any others
            setting = replace(setting, training=replace(training, batch=setting.step_records))
        if stage == "encode":
            setting = replace(setting, cut=None, class_images=min(setting.class_images, 1))
            if not setting.class_images:  # without the U-Net
                setting = replace(setting, base_bits=None)
        else:  # without class pictures
            setting = replace(setting, class_images=0)
        if stage != "precompute":  # where alone the middle may be away
            setting = replace(setting, stream_middle=False)
        if stage in ("precompute", "train"):  # without the VAE
            setting = replace(setting, tiled_vae=False)
        if stage != "train":  # which alone reads records
            setting = replace(setting, samples=1, store_dtype=torch.float16)
        if (stage, setting) not in self._runs:
            # whatever mode the caller is in
            with torch.inference_mode(False), torch.enable_grad():
                model = self._outline(DTYPES[training.precision])
                keep_small(model, setting, "meta")
                if setting.stream_middle and not setting.streaming and setting.cut is not None:
                    stream_middle(model.unet, setting.cut, "meta")
                run = {"encode": _encode, "precompute": _precompute, "train": _train, "sample": _sample}[stage]
                self._runs[stage, setting] = run(model, setting)
        return self._runs[stage, setting]


def _outline_unet(config: Config, dtype: torch.dtype) -> BaseModel:
    """As `models.outline`, but without anything beside the U-Net; a side of a latent is 8 pixels."""
    (unet,) = without_data([partial(UNet2DConditionModel.from_config, config)], dtype)
    return BaseModel(unet, None, (), (), DDPMScheduler(), layout_name(config), 8 * config["sample_size"])


def parse_bytes(text: str) -> int:
    """ "4GB", "3.5 GiB" or "800M" in bytes, as graphics cards are sold: a GB is 2³⁰ of them.

    Raises HollowError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise HollowError(f"{text!r} is no amount of memory. Write it as 4GB or 800MB.")
    return int(float(match[1]) * {"G": GIB, "M": 2**20}[match[2].upper()])


def _ways(setting: Setting, precisions: tuple[Precision, ...], depth: int) -> list[Setting]:
    """From the fastest to the smallest, without streaming unless it is asked for; the U has `depth` levels."""
    ways = [replace(setting, training=replace(setting.training, precision=each)) for each in precisions]
    smallest = min(ways, key=lambda way: DTYPES[way.training.precision].itemsize)
    one_by_one = replace(smallest, training=replace(smallest.training, together=1))
    recompute = replace(one_by_one.training, gradient_checkpointing=True)
    levels = (*range(1, depth), None) if not setting.training.gradient_checkpointing else (recompute.checkpoint_levels,)
    checkpointing = [replace(smallest, training=replace(recompute, checkpoint_levels=number)) for number in levels]
    quantized = replace(checkpointing[-1], base_bits=setting.base_bits or 8)
    return list(dict.fromkeys([*ways, one_by_one, *checkpointing, quantized]))


def _levels(training: TrainSettings) -> str:
    levels = training.checkpoint_levels
    return "" if levels is None else f" of {levels} level{'s' * (levels > 1)}"


def _gave_up(setting: Setting, first: Setting) -> tuple[str, ...]:
    training = setting.training
    given = []
    if setting.cut is not None:
        given.append(f"the middle of the U-Net (cut {setting.cut})")
    if training.precision != first.training.precision:
        given.append(f"{first.training.precision} for {training.precision}")
    if training.together != first.training.together:
        given.append(f"the speed of {first.training.together} records at once")
    if training.gradient_checkpointing != first.training.gradient_checkpointing:
        given.append(f"the time to compute activations twice (gradient checkpointing{_levels(training)})")
    if setting.base_bits != first.base_bits:
        given.append(f"the last digits of the base ({setting.base_bits} bits a weight)")
    if setting.tiled_vae != first.tiled_vae:
        given.append("seams between a picture's tiles, faint at most (tiled VAE)")
    if setting.stream_middle != first.stream_middle:
        given.append("the time to bring the middle from main memory while precomputing (streamed middle)")
    if setting.streaming != first.streaming:
        given.append("the time to bring weights from main memory (streaming)")
    return tuple(given)


def _encode(model: BaseModel, setting: Setting) -> tuple[Peak, int]:
    """A picture, then a prompt, and one of the class: VAE, text encoders and U-Net are there in turn, as in
    `personalize`."""
    side = setting.resolution or model.resolution
    picture = TrainingImage(Image.new("RGB", (side, side)), None, "", (0, 0, side, side))
    assert model.vae is not None
    with DryRun() as images:
        images.hold("weights", model.vae)
        encode_images(model, [picture])
    prompt, settings = personal_prompt("sks", "dog"), SampleSettings(steps=_passes(setting), size=(side, side))
    with DryRun() as prompts:
        _hold(prompts, *model.text_encoders)
        encode_prompt(model, prompt, settings.size)
    if not setting.class_images:
        return _in_turn(images, prompts)
    with DryRun() as guided:
        _hold(guided, *model.text_encoders)
        text = encode_guided(model, prompt, settings)
    with DryRun() as drawing:
        _hold(drawing, model.unet)
        draw(model, text, [0], settings)
    return _in_turn(images, prompts, guided, drawing)


def _precompute(model: BaseModel, setting: Setting) -> tuple[Peak, int]:
    """Records by the base path, of which alone is there what it passes; an ordinary LoRA needs none."""
    latents, prompt = _inputs(model, setting)
    example = Example(latents, prompt, prompt, "", "")
    with DryRun() as run:
        if setting.cut is not None:
            base = head(model.unet, setting.cut).eval()
            _hold(run, base)
            for _ in range(_passes(setting)):
                run_to_exit(base, model.schedule, _RECORD, example)
    return run.peak(), run.flops


def _train(model: BaseModel, setting: Setting) -> tuple[Peak, int]:
    """The first steps of `train`, with two parts of the records at most: more are no more memory."""
    training = setting.training
    unet = model.unet if setting.cut is None else hollow(model.unet, setting.cut, range(setting.samples))
    store = OneRecord(model, setting)
    del model
    few = replace(training, batch=min(training.batch, 2 * training.together), save_every=0, zo_timesteps=None)

    def stop_there(done: Progress) -> None:
        if done.step == _passes(setting):
            raise _EnoughSteps

    with TemporaryDirectory() as folder, DryRun() as run, suppress(_EnoughSteps):
        _hold(run, unet)
        train(unet, store.schedule, store, few, folder=folder, progress=stop_there)
    return run.peak(), run.flops * training.batch // (few.batch * _passes(setting))


def _sample(model: BaseModel, setting: Setting) -> tuple[Peak, int]:
    """A denoising step with classifier-free guidance, on two paths where something is hollowed, and the picture;
    text encoders, U-Net and VAE are there in turn, as in `sample`."""
    side, training = setting.resolution or model.resolution, setting.training
    settings = SampleSettings(steps=_passes(setting), size=(side, side))
    prompt = personal_prompt("sks", "dog")
    recipe = recipe_for(setting.cut, "sks", "dog", model.schedule.config.prediction_type)
    add_lora(
        model.unet if setting.cut is None else hollow(model.unet, setting.cut, None),
        training.rank,
        targets=training.targets,
        generator=torch.Generator(),
    )
    assert model.vae is not None
    with DryRun() as prompts:
        _hold(prompts, *model.text_encoders)
        text = encode_guided(model, prompt, settings)
        generic = None if setting.cut is None else encode_prompt(model, recipe.generic_prompt, settings.size)
    with DryRun() as drawing:
        _hold(drawing, model.unet)
        drawing.name("lora", lora_parameters(model.unet))
        latents = draw(model, text, [0], settings, recipe, generic)
    with DryRun() as picture:
        picture.hold("weights", model.vae)
        decode_images(model, [latents])
    return _in_turn(prompts, drawing, picture)


def _in_turn(*runs: DryRun) -> tuple[Peak, int]:
    """Of what happens one after the other."""
    return max((run.peak() for run in runs), key=lambda peak: peak.total), sum(run.flops for run in runs)


def _hold(run: DryRun, *modules: nn.Module) -> None:
    """Count what of them is on the device."""
    for module in modules:
        elsewhere = {id(tensor) for tensor in away(module)}
        run.name("weights", [each for each in (*module.parameters(), *module.buffers()) if id(each) not in elsewhere])


def _passes(setting: Setting) -> int:
    """After which the fullest moment was seen: streaming sends ahead from the second on."""
    return 2 if setting.streaming or setting.stream_middle else 1


def _inputs(model: BaseModel, setting: Setting) -> tuple[Tensor, Conditioning]:
    """Latents and a prompt on the CPU, as a store hands them out."""
    config = model.unet.config
    scale = model.resolution // config.sample_size
    return inputs({**config, "sample_size": (setting.resolution or model.resolution) // scale})


_RECORD = Record(image=0, kind="image", timestep=0, noise_seed=0)


class _EnoughSteps(Exception):
    """Enough was seen."""


class OneRecord(Store):
    """A store of one record, on no disk, of zeros: enough for `train` to run a step with this setting."""

    missing: list[int] = []  # noqa: RUF012  # a property of Store

    def __init__(self, model: BaseModel, setting: Setting) -> None:
        self.schedule: DDPMScheduler = model.schedule
        fingerprint = Fingerprint(
            "", setting.cut, schedule_id(self.schedule), 1, 0, str(setting.store_dtype), ["image"], [], [], []
        )
        super().__init__(Path(), fingerprint, [_RECORD])
        self._given = _inputs(model, setting)
        if setting.cut is not None:
            shape = exit_shape(model.unet.config, setting.cut, *self._given[0].shape[-2:])
            self._exit_activation = torch.zeros(1, *shape, dtype=setting.store_dtype)

    def record(self, index: int) -> Record:
        return _RECORD if self.cut is None else _RECORD._replace(exit_activation=self._exit_activation)

    def inputs(self, image: int) -> tuple[Tensor, Conditioning]:
        return self._given
