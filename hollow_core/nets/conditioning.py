"""What a network sees of a prompt."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.patches import Place
from ..errors import HollowError
from .transfer import send


class Conditioning(NamedTuple):
    """A prompt as the network sees it."""

    encoder_hidden_states: Tensor  # (batch, tokens, width); of Krea 2 (batch, tokens, layers, width)
    text_embeds: Tensor | None = None  # SDXL, SD3, FLUX: pooled text embedding (batch, width)
    time_ids: Tensor | None = None  # SDXL: original size, crop and target size in pixels (batch, 6)
    guidance: Tensor | None = None  # what a network distilled for guidance is told (batch,); None: 1, as in training
    place: Tensor | None = None  # of crops: each's `Place` (batch, 4), in main memory; None: whole pictures

    def kwargs(self) -> dict[str, Any]:
        """The arguments under which a diffusers U-Net expects it."""
        if self.text_embeds is None:
            return {"encoder_hidden_states": self.encoder_hidden_states}
        added = {"text_embeds": self.text_embeds, "time_ids": self.time_ids}
        return {"encoder_hidden_states": self.encoder_hidden_states, "added_cond_kwargs": added}

    @property
    def crop(self) -> Place | None:
        """The place of all crops of a batch; None: whole pictures. Raises HollowError where they differ, as position
        codes are one for a batch."""
        if self.place is None:
            return None
        if (self.place != self.place[0]).any():
            raise HollowError(
                "Crops of different places cannot pass a transformer together. Take those that are alike."
            )
        return Place(*self.place[0].tolist())

    @property
    def alike(self) -> Hashable:
        """What prompts of one batch have in common."""
        return self.encoder_hidden_states.shape, None if self.place is None else tuple(self.place[0].tolist())

    @classmethod
    def batch(cls, prompts: "Sequence[Conditioning]") -> "Conditioning":
        """Several prompts of as many tokens in one batch."""
        return cls._make(None if parts[0] is None else torch.cat(parts) for parts in zip(*prompts, strict=True))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Conditioning":
        """The same conditioning elsewhere, but for the place; None leaves device or dtype as it is."""
        moved = self._replace(place=None)
        parts = (part if part is None else send(part, device or part.device, dtype) for part in moved)
        return Conditioning._make(parts)._replace(place=self.place)
