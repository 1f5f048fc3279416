"""What all above asks of a base model: nothing else there knows whether it is of U-Nets or of transformers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from diffusers import ConfigMixin
from torch import nn

from ..nets.conditioning import Conditioning
from ..nets.network import Network
from ..nets.schedule import NoiseSchedule
from .single_file import quiet

TimestepSampling = Literal["shifted", "logit-normal", "uniform"]
"""How flow matching draws time steps: logit-normal and then shifted as the model is, or not shifted, or all alike."""


class Model(Protocol):
    """The parts of a base model; what is no longer needed may be set free (`free_encoders`)."""

    vae: Any
    """None once set free."""

    @property
    def text_encoders(self) -> tuple[nn.Module, ...]:
        """Empty once set free."""
        ...

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        """Their tokenizers."""
        ...

    @property
    def large_encoders(self) -> tuple[nn.Module, ...]:
        """Text encoders that are worth quantising."""
        ...

    @property
    def network(self) -> Network:
        """What is trained."""
        ...

    @property
    def schedule(self) -> NoiseSchedule:
        """As `schedule_for` gives it, for the native size and as usual. Raises HollowError as it does."""
        ...

    @property
    def layout(self) -> str:
        """The model's kind, for files: "sd15", "sd21", "sdxl", "other", or a family's name."""
        ...

    @property
    def resolution(self) -> int:
        """The native side of a picture in pixels."""
        ...

    @property
    def latent_side(self) -> int:
        """The native side of a picture in latents."""
        ...

    @property
    def pixels_per_latent(self) -> int:
        """To a side."""
        ...

    @property
    def usual_guidance(self) -> float:
        """Scale of guidance in sampling, where nobody asks for another."""
        ...

    def schedule_for(self, sampling: TimestepSampling | None, side: int) -> NoiseSchedule:
        """The noise schedule of training on pictures of about `side` squared pixels; None draws time steps as usual.
        Raises HollowError where a model has no such choice, and for a prediction type that is unknown."""
        ...

    def outlines(self) -> "Outlines":
        """What gives models of the same parts, of tensors without data; it keeps nothing of the weights."""
        ...

    def encode_prompt(self, text: str, size: tuple[int, int] | None) -> Conditioning:
        """What the network sees of a prompt, for a picture of `size`, (height, width) in pixels; None is the native
        one."""
        ...

    def tokens(self, text: str) -> list[list[int]]:
        """Those of a prompt that are read, by each text encoder: what is alike in them is alike to the network."""
        ...

    def encode_guided(self, prompt: str, negative: str, guidance: float) -> dict[str, Any]:
        """A prompt and, where it guides, the negative one, as `sampling.sample.draw` takes them of this kind."""
        ...

    def batch_guided(self, texts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What `encode_guided` gives for several prompts, as one batch."""
        ...

    def free_encoders(self) -> None:
        """Let go of VAE and text encoders."""
        ...


Outlines = Callable[[torch.dtype], Model]
"""Gives a model of tensors without data, in a dtype."""


def maker_of(part: Any) -> Callable[[], nn.Module]:
    """What makes another of its kind and sizes."""
    kind: Any = type(part)
    return partial(kind.from_config if isinstance(part, ConfigMixin) else kind, part.config)


def without_data(makers: Sequence[Callable[[], nn.Module]], dtype: torch.dtype) -> list[Any]:
    """Frozen modules whose tensors hold no data (on PyTorch's "meta" device)."""
    with quiet(), torch.device("meta"):
        return [nn.Module.to(make().eval().requires_grad_(False), dtype=dtype) for make in makers]
