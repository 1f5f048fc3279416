"""What the wires between Hollow's own nodes carry: small handles; the bytes stay on disk or in ComfyUI's models."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from ..hollow_core.lora.metadata import Recipe
    from ..hollow_core.nets.residency import Bits


class HollowedModel(NamedTuple):
    """HOLLOW_UNET: a MODEL, how much of it leaves memory, and how what is left is kept."""

    model: Any  # ComfyUI's ModelPatcher
    cut: int
    base_bits: "Bits | None" = None
    streaming: bool = False
    gradient_checkpointing: bool = False
    """Whether the budget asks for it."""
    checkpoint_levels: int | None = None
    """In how many levels of the U, from the outermost; None for all."""


class HollowActivations(NamedTuple):
    """HOLLOW_ACTIVATIONS: a finished store, and the words it was made for, as far as they are known."""

    folder: Path
    personal_prompt: str
    generic_prompt: str
    identifier: str


class HollowLora(NamedTuple):
    """HOLLOW_LORA: a LoRA, and what two-path sampling must know of its training."""

    state: dict[str, Tensor]
    """As in a file: "lora_unet_….lora_down.weight" (rank, in, …), ".lora_up.weight" (out, rank, …), ".alpha"."""
    recipe: "Recipe"
    metadata: dict[str, str]
    """The file's, all of it."""
