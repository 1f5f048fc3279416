"""Predicts the memory of every stage before anything is loaded, and picks what fits into a budget.

Each stage's real code runs once on tensors without data (`dry_run`), so a prediction cannot rot.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from ..data.patches import check_patches
from ..errors import HollowError
from ..models.base_model import Outlines, outline
from ..nets.network import Cut, cut_in_words, removed_fraction
from ..nets.residency import stream_middle
from ..training.settings import DTYPES, Precision, TrainSettings
from .dry_run import Peak
from .setting import Setting, levels_in_words
from .stages import RUNS, STAGES

GIB = 2**30


@dataclass(frozen=True)
class Prediction:
    """What a setting will need."""

    setting: Setting
    stages: Mapping[str, Peak]
    """The peak of each stage of `STAGES`."""
    store_bytes: int
    """Of what the base path leaves on the disk."""
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
            "ema": training.ema,
            "fused_backward": training.fused_backward,
            "rank": training.rank,
            "dora": training.dora,
            "batch": training.batch,
            "together": training.together,
            "bytes": self.bytes,
            "stages": {name: {"total": peak.total, **peak.bytes} for name, peak in self.stages.items()},
            "main_memory": {name: peak.main_memory for name, peak in self.stages.items()},
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
    """Predictions for one model: a layout ("sd15", "flux" and so on) or a path, as for `outline`, or what gives its
    outline: `outlines` of one that is loaded. Of one without a VAE, whose pictures and prompts others encode and draw,
    there are the stages precompute and train alone.

    Raises HollowError as `outline` does.
    """

    def __init__(self, model: str | Outlines) -> None:
        self._outline: Outlines = partial(outline, model) if isinstance(model, str) else model
        self._runs: dict[tuple[str, Setting], tuple[Peak, int]] = {}  # what was run once
        known = self._known = self._outline(torch.float32)
        self.stages = STAGES if known.vae is not None else ("precompute", "train")
        self.road = [stage for stage in ROAD if stage in self.stages]
        self.network, self._pixels, self.resolution = known.network, known.pixels_per_latent, known.resolution

    def predict(self, setting: Setting) -> Prediction:
        """Of every stage. Raises HollowError for a cut, a resolution or a number of records that cannot be."""
        self.check(setting)
        peaks = {stage: self._run(stage, setting)[0] for stage in self.stages}
        return Prediction(setting, peaks, self.store_bytes(setting), self.step_flops(setting))

    def step_flops(self, setting: Setting) -> int:
        """Operations of a training step. Raises HollowError as `predict` does."""
        self.check(setting)
        return self._run("train", setting)[1]

    def store_bytes(self, setting: Setting) -> int:
        """Of what the base path leaves on the disk. Raises HollowError as `predict` does."""
        self.check(setting)
        if setting.cut is None:
            return 0
        width, height = (side // self._pixels for side in setting.recorded(self.resolution))
        shapes = self.network.stored_shapes(setting.cut, height, width).values()
        return (
            setting.samples * sum(map(math.prod, shapes)) * (setting.store_dtype or self.network.record_dtype).itemsize
        )

    def peak(self, stage: str, setting: Setting) -> Peak:
        """Of one stage of `STAGES` only. Raises HollowError as `predict` does."""
        self.check(setting)
        return self._run(stage, setting)[0]

    def cuts(self) -> list[Cut]:
        """Those worth a look: they leave at least 15 % of the network, as the paper's do, and attention in it."""
        network = self.network
        return [
            cut for cut in network.cuts() if network.leaves_attention(cut) and removed_fraction(network, cut) <= 0.85
        ]

    def fit(
        self,
        budget: int,
        setting: Setting,
        *,
        precisions: Iterable[Precision] = ("fp32", "bf16"),
        cuts: Sequence[Cut | None] | None = None,
        fixed: Collection[str] = (),
    ) -> Fit:
        """The least hollowing, and for it the fastest way, whose stages all stay within `budget` bytes.

        From the whole network on, cut by cut (those of `cuts()`, or `cuts` if given), the ways are tried that give up
        least: `precisions` in their order, then in the smallest of them one record at a time, gradient checkpointing,
        level by level from the outermost, then a base in 8 bits; with a tiled VAE where pictures would not fit
        otherwise, and a streamed middle where precomputing would not. Where no cut fits so, all is streamed: last, as
        it is the slowest, while a cut makes steps faster. All else is as in `setting`, those levers included that are
        `fixed`: of together, gradient_checkpointing, checkpoint_levels, base_bits, tiled_vae, stream_middle and
        streaming. Sampling is not counted, as any other tool can draw with the LoRA. Raises HollowError where nothing
        fits, saying what the smallest would need.
        """
        self.check(setting)
        resident = _ways(setting, tuple(precisions), self.network.levels, fixed)
        streamed = [_but(resident[-1], fixed, streaming=True)]
        cuts = (None, *self.cuts()) if cuts is None else cuts
        for ways, cut in product((resident, streamed), cuts):
            settings = [each for way in ways if self._weights(each := replace(way, cut=cut)) <= budget]
            if not settings or not self._fits(self.eased(settings[-1], budget, fixed), budget):  # the smallest of them
                continue
            for tried in (self.eased(setting, budget, fixed) for setting in settings):
                if self._fits(tried, budget):
                    return Fit(self.predict(tried), _gave_up(tried, resident[0]))
        least = [self.eased(replace(streamed[0], cut=cut), 0, fixed) for cut in cuts]
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

    def eased(self, setting: Setting, budget: int, fixed: Collection[str] = ()) -> Setting:
        """The setting with a tiled VAE where encoding, and a streamed middle where precomputing would not stay within
        `budget` bytes without; unless they are `fixed`."""
        if "encode" in self.stages and self._run("encode", setting)[0].total > budget:
            setting = _but(setting, fixed, tiled_vae=True)
        if not setting.streaming and self._run("precompute", setting)[0].total > budget:
            setting = _but(setting, fixed, stream_middle=True)
        return setting

    def check(self, setting: Setting) -> None:
        """Raises HollowError for what this model cannot do."""
        if setting.cut is not None:
            self.network.check_cut(setting.cut)
        if setting.timestep_sampling is not None:
            self._known.schedule_for(setting.timestep_sampling, self.resolution)
        size = setting.measured(self.resolution)
        for side in size:
            if side < 1 or side % self._pixels:
                raise HollowError(
                    f"The resolution {side} is no multiple of {self._pixels} pixels. Take 512, 768 or 1024."
                )
        if setting.patches is not None:
            check_patches(setting.patches, size, self._pixels * (self.network.token_side or 1))
        setting.check()

    def _fits(self, setting: Setting, budget: int) -> bool:
        return all(self._run(stage, setting)[0].total <= budget for stage in self.road)

    def _weights(self, setting: Setting) -> int:
        """Bytes of those that training has on the device, at least: what needs no dry run to be too much."""
        if setting.streaming:
            return 0
        bits = setting.base_bits or 8 * DTYPES[setting.training.precision].itemsize
        left = 1.0 if setting.cut is None else 1 - removed_fraction(self.network, setting.cut)
        return round(left * sum(each.numel() for each in self.network.module.parameters()) * bits / 8)

    def _bytes(self, setting: Setting) -> int:
        return max(self._run(stage, setting)[0].total for stage in self.road)

    def _run(self, stage: str, setting: Setting) -> tuple[Peak, int]:
        """Peak and operations of a stage; settings that do not matter to it are one to it."""
        training = setting.training
        if stage == "train" and training.strategy == "selective":
            return self._run_both(setting)
        size = (setting.recorded if stage in ("precompute", "train") else setting.measured)(self.resolution)
        if stage != "train":
            training = TrainSettings(precision=training.precision, together=setting.at_once(stage))
            if stage == "sample":
                old = setting.training
                training = replace(training, rank=old.rank, alpha=old.alpha, targets=old.targets, dora=old.dora)
        setting = replace(setting, resolution=None, size=size, low_resolution=None, patches=None, training=training)
        if stage == "train":  # records of the class are like any others
            setting = replace(setting, training=replace(training, batch=setting.step_records))
        setting = replace(setting, own_class_images=0)
        if stage == "encode":
            setting = replace(setting, cut=None, class_images=min(setting.class_images, training.together))
            if not setting.class_images and not self._known.large_encoders:  # nothing is quantised, then
                setting = replace(setting, base_bits=None)
        else:  # without class pictures
            setting = replace(setting, class_images=0)
        if stage != "precompute":  # where alone the middle may be away
            setting = replace(setting, stream_middle=False)
        if stage in ("precompute", "train"):  # without the VAE
            setting = replace(setting, tiled_vae=False)
        if stage != "train":  # which alone reads records
            setting = replace(setting, samples=1, store_dtype=None)
        if (stage, setting) not in self._runs:
            # whatever mode the caller is in
            with torch.inference_mode(False), torch.enable_grad():
                model = self._outline(DTYPES[training.precision])
                setting.keep_small(model, "meta")
                if setting.stream_middle and not setting.streaming and setting.cut is not None:
                    stream_middle(model.network, setting.cut, "meta")
                self._runs[stage, setting] = RUNS[stage](model, setting)
        return self._runs[stage, setting]

    def _run_both(self, setting: Setting) -> tuple[Peak, int]:
        """Training by two kinds of steps, where the larger counts: while one goes on, the other's optimizer states are
        there, too."""
        low, high = (replace(setting, training=replace(setting.training, strategy=each)) for each in ("bp", "zo"))
        high = replace(high, patches=None)
        if low.patches is None:
            full = setting.resolution or self.resolution
            factor = setting.low_side(full) / full
            width, height = (-(-round(side * factor) // 64) * 64 for side in setting.measured(self.resolution))
            low = replace(low, size=(width, height))
        peaks, flops = zip(*(self._run("train", part) for part in (low, high)), strict=True)
        both = sum(peak.bytes["optimizer"] for peak in peaks)
        fullest = [Peak({**peak.bytes, "optimizer": both}, peak.main_memory) for peak in peaks]
        return max(fullest, key=lambda peak: peak.total), max(flops)


def parse_bytes(text: str) -> int:
    """ "4GB", "3.5 GiB" or "800M" in bytes, as graphics cards are sold: a GB is 2³⁰ of them.

    Raises HollowError for anything else.
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*([GM])(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise HollowError(f"{text!r} is no amount of memory. Write it as 4GB or 800MB.")
    return int(float(match[1]) * {"G": GIB, "M": 2**20}[match[2].upper()])


def _ways(setting: Setting, precisions: tuple[Precision, ...], depth: int, fixed: Collection[str]) -> list[Setting]:
    """From the fastest to the smallest, without streaming unless it is asked for; `depth` levels can recompute."""
    ways = [replace(setting, training=replace(setting.training, precision=each)) for each in precisions]
    smallest = min(ways, key=lambda way: DTYPES[way.training.precision].itemsize)
    one_by_one = _but(smallest, fixed, together=1)
    asked = setting.training.gradient_checkpointing or not {"gradient_checkpointing", "checkpoint_levels"}.isdisjoint(
        fixed
    )
    levels = (setting.training.checkpoint_levels,) if asked else (*range(1, depth), None)
    checkpointing = [
        _but(one_by_one, fixed, gradient_checkpointing=True, checkpoint_levels=number) for number in levels
    ]
    quantized = _but(checkpointing[-1], fixed, base_bits=setting.base_bits or 8)
    return list(dict.fromkeys([*ways, one_by_one, *checkpointing, quantized]))


def _but(setting: Setting, fixed: Collection[str], **levers: Any) -> Setting:
    """The setting with these levers, whether its own or its training's, but for the `fixed`."""
    free = {name: value for name, value in levers.items() if name not in fixed}
    of_training = {name: free.pop(name) for name in list(free) if hasattr(setting.training, name)}
    return replace(setting, training=replace(setting.training, **of_training), **free)


def _gave_up(setting: Setting, first: Setting) -> tuple[str, ...]:
    training = setting.training
    given = []
    if setting.cut is not None:
        gone = "the middle" if isinstance(setting.cut, int) else "both ends"
        given.append(f"{gone} of the network (cut {cut_in_words(setting.cut)})")
    if training.precision != first.training.precision:
        given.append(f"{first.training.precision} for {training.precision}")
    if training.together != first.training.together:
        given.append(f"the speed of {first.training.together} records at once")
    if training.gradient_checkpointing != first.training.gradient_checkpointing:
        given.append(f"the time to compute activations twice (gradient checkpointing{levels_in_words(training)})")
    if setting.base_bits != first.base_bits:
        given.append(f"the last digits of the base ({setting.base_bits} bits a weight)")
    if setting.tiled_vae != first.tiled_vae:
        given.append("seams between a picture's tiles, faint at most (tiled VAE)")
    if setting.stream_middle != first.stream_middle:
        gone = "the middle" if isinstance(setting.cut, int) else "both ends"
        given.append(f"the time to bring {gone} from main memory while precomputing (streamed middle)")
    if setting.streaming != first.streaming:
        given.append("the time to bring weights from main memory (streaming)")
    return tuple(given)
