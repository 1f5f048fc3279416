"""What a network sees of a prompt."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .transfer import send


class Conditioning(NamedTuple):
    """A prompt as the network sees it."""

    encoder_hidden_states: Tensor  # (batch, tokens, width); of Krea 2 (batch, tokens, layers, width)
    text_embeds: Tensor | None = None  # SDXL, SD3, FLUX: pooled text embedding (batch, width)
    time_ids: Tensor | None = None  # SDXL: original size, crop and target size in pixels (batch, 6)
    guidance: Tensor | None = None  # what a network distilled for guidance is told (batch,); None: 1, as in training

    def kwargs(self) -> dict[str, Any]:
        """The arguments under which a diffusers U-Net expects it."""
        if self.text_embeds is None:
            return {"encoder_hidden_states": self.encoder_hidden_states}
        added = {"text_embeds": self.text_embeds, "time_ids": self.time_ids}
        return {"encoder_hidden_states": self.encoder_hidden_states, "added_cond_kwargs": added}

    @classmethod
    def batch(cls, prompts: "Sequence[Conditioning]") -> "Conditioning":
        """Several prompts of as many tokens in one batch."""
        return cls._make(None if parts[0] is None else torch.cat(parts) for parts in zip(*prompts, strict=True))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Conditioning":
        """The same conditioning elsewhere; None leaves device or dtype as it is."""
        parts = (part if part is None else send(part, device or part.device, dtype) for part in self)
        return Conditioning._make(parts)
