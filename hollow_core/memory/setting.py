"""One way to go the whole road: every lever."""

from dataclasses import dataclass, field

import torch

from ..data.images import check_resolution
from ..errors import HollowError
from ..models.base_model import keep_small
from ..models.model import Model, TimestepSampling
from ..nets.network import Cut, cut_in_words
from ..nets.residency import Bits
from ..training.precompute import check_samples
from ..training.settings import TrainSettings, check_unfused
from ..training.store import SHARD

_OPTIMIZERS = {
    "adamw8bit": "8-bit AdamW",
    "prodigy": "Prodigy",
    "adafactor": "Adafactor",
    "lion": "Lion",
    "schedulefree": "schedule-free AdamW",
}  # in words


@dataclass(frozen=True)
class Setting:
    """One way to go the whole road. The base is loaded in the precision of `training`."""

    cut: Cut | None = 3
    """How much to hollow; None trains an ordinary LoRA on the whole network."""
    resolution: int | None = None
    """Side of the pictures in pixels, or of a square of about their area; None is the model's own."""
    samples: int = 200
    """Records in the store."""
    class_images: int = 0
    """Pictures of the class that the base draws for prior preservation; with any, a step has twice the records. 0 does
    without."""
    store_dtype: torch.dtype | None = None
    """How records are kept; None: as is usual for the network."""
    base_bits: Bits | None = None
    """Bits of a weight of the frozen base; None keeps them in the precision."""
    streaming: bool = False
    """The weights of network and text encoders are in main memory and visit the device."""
    stream_middle: bool = False
    """While precomputing, those of what the cut takes out are."""
    tiled_vae: bool = False
    """Pictures are encoded and decoded in tiles."""
    training: TrainSettings = field(default_factory=TrainSettings)
    low_resolution: int | None = None
    """Side in pixels of the pictures for BP-low, if the strategy is selective; None is half of the others', or the
    next multiple of 8 below."""
    patches: int | None = None
    """Side in pixels of the square patches that are learned in place of whole pictures, or, if the strategy is
    selective, in place of the small ones for BP-low; None: none."""
    size: tuple[int, int] | None = None
    """Of the largest picture, width and height in pixels; None is the square of the resolution."""
    own_class_images: int = 0
    """The person's own pictures of the class, beside those that the base draws."""
    timestep_sampling: TimestepSampling | None = None
    """How time steps are drawn for a model of flow matching; None is the usual way, "shifted"."""

    def __post_init__(self) -> None:
        """Raises HollowError for a number that cannot be."""
        if self.resolution is not None and self.resolution < 8:  # that of pictures of many shapes may be any above
            check_resolution(self.resolution)
        if self.low_resolution is not None:
            check_resolution(self.low_resolution)
        if self.class_images < 0:
            raise HollowError(f"There cannot be {self.class_images} pictures of the class. Give 0 for none.")

    def keep_small(self, model: Model, device: torch.device | str) -> None:
        """`models.base_model.keep_small`, as it says."""
        keep_small(model, device, base_bits=self.base_bits, streaming=self.streaming, tiled_vae=self.tiled_vae)

    @property
    def step_records(self) -> int:
        """Records that a training step goes through, those of the class included."""
        prior = self.class_images + self.own_class_images
        return self.training.batch * (2 if prior and self.training.prior_weight > 0 else 1)

    def measured(self, resolution: int) -> tuple[int, int]:
        """The size of the largest picture, where the model's own resolution is this."""
        side = self.resolution or resolution
        return self.size or (side, side)

    def recorded(self, resolution: int) -> tuple[int, int]:
        """The size of what the largest record is of: the largest picture, unless all are of patches."""
        if self.patches is None or self.training.strategy == "selective":
            return self.measured(resolution)
        return self.patches, self.patches

    def low_side(self, resolution: int) -> int:
        """`low_resolution`, or what it is where it is None, for pictures of this resolution."""
        return resolution // 16 * 8 if self.low_resolution is None else self.low_resolution

    def at_once(self, stage: str) -> int:
        """How many records or pictures of a stage pass the U-Net together: as many as are asked for, and there."""
        there = {"encode": self.class_images, "precompute": SHARD, "train": self.step_records}.get(stage, 1)
        return max(min(self.training.together, there), 1)

    def check(self) -> None:
        """Raises HollowError for what does not go together, whatever the model."""
        check_samples(self.samples, 2 if self.class_images or self.own_class_images else 1)
        if self.patches is not None and self.low_resolution is not None:
            raise HollowError(
                f"Patches of {self.patches} pixels stand in for small pictures of {self.low_resolution}. Leave one of "
                "them out."
            )
        if self.step_records > self.training.batch:
            check_unfused(self.training)

    def __str__(self) -> str:
        training = self.training
        return f"{'the whole network' if self.cut is None else f'cut {cut_in_words(self.cut)}'} in " + ", ".join(
            [
                training.precision,
                *([f"gradient checkpointing{levels_in_words(training)}"] if training.gradient_checkpointing else []),
                *([f"{training.together} records at once"] if training.together > 1 else []),
                *([f"{self.base_bits}-bit base"] if self.base_bits else []),
                *(["streaming"] if self.streaming else []),
                *(["streamed middle"] if self.stream_middle else []),
                *(["tiled VAE"] if self.tiled_vae else []),
                *([f"patches of {self.patches}"] if self.patches else []),
                *(["DoRA"] if training.dora else []),
                *(["bf16 LoRA"] if training.lora_precision == "bf16" else []),
                *([_OPTIMIZERS[training.optimizer]] if training.optimizer != "adamw" else []),
                *(["EMA"] if training.ema is not None else []),
                *(["fused backward"] if training.fused_backward else []),
            ]
        )


def levels_in_words(training: TrainSettings) -> str:
    """ " of 2 levels", or nothing where all of them recompute."""
    levels = training.checkpoint_levels
    return "" if levels is None else f" of {levels} level{'s' * (levels > 1)}"
