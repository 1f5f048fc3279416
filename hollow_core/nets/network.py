"""What all above asks of a network that can be hollowed: nothing else there knows what kind it is.

What the base path leaves in a record is a mapping of named tensors (1, …), which the network alone understands.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn

from .conditioning import Conditioning

Cut: TypeAlias = int | tuple[int, int]
"""How much is hollowed; of a U-Net the paper's k, of a transformer how many blocks of the front and of the back."""

Stored: TypeAlias = Mapping[str, Tensor]
"""What a record keeps of the base path, by names that are the network's own business."""


class Targets(NamedTuple):
    """Ends of the names of layers for a LoRA."""

    attention: tuple[str, ...]
    all: tuple[str, ...]
    """With those of feed-forward layers and the like: more is learned in fewer steps, in a larger file."""


class BasePath(Protocol):
    """A network up to the exit of a cut."""

    @property
    def module(self) -> nn.Module:
        """What must be on the device while it runs."""
        ...

    @property
    def sees_identifier(self) -> bool:
        """Whether it is given the personal prompt, not the generic one."""
        ...

    def __call__(self, noisy: Tensor, timesteps: Sequence[int], conditioning: Conditioning) -> Stored:
        """What to keep for `noisy` latents (batch, channels, height, width), one time step each, without gradients:
        tensors (batch, …)."""
        ...


class Network(Protocol):
    """A frozen network, whole or hollowed."""

    @property
    def module(self) -> nn.Module:
        """Its layers; a LoRA goes into this."""
        ...

    @property
    def cut(self) -> Cut | None:
        """At which it was hollowed; None while it is whole."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """Its kind and sizes, ready for JSON but for what begins with an underscore; names it with its weights."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its arithmetic."""
        ...

    @property
    def within(self) -> tuple[str, ...]:
        """The beginnings of the paths of layers that may get a LoRA."""
        ...

    @property
    def targets(self) -> "Targets":
        """Which of them usually get one."""
        ...

    @property
    def kept(self) -> tuple[str, ...]:
        """The beginnings of the paths of layers that are neither quantised nor streamed, as they are small."""
        ...

    @property
    def record_dtype(self) -> torch.dtype:
        """How its records are usually kept."""
        ...

    @property
    def usual_cut(self) -> Cut:
        """Where nobody asks for another."""
        ...

    @property
    def levels(self) -> int:
        """How many parts can `checkpoint` by themselves."""
        ...

    @property
    def token_side(self) -> int | None:
        """Latents to a side of what has a place in the picture; None: nothing has."""
        ...

    def check_inputs(self, name: str, latents: Tensor, prompts: Sequence[Conditioning]) -> None:
        """Raises HollowError, which calls them by `name`, for latents or prompts of a size that it does not take."""
        ...

    def cuts(self) -> Sequence[Cut]:
        """Every cut that it has, from the least on."""
        ...

    def nearest_cut(self, share: float) -> Cut:
        """Whose share of the parameters, from 0 to 1, comes nearest; where there are two ends, of both evenly."""
        ...

    def check_cut(self, cut: Cut) -> None:
        """Raises HollowError for a cut that it has not."""
        ...

    def blocks(self, cut: Cut) -> list[str]:
        """The names of what a cut takes out, in the order in which it runs."""
        ...

    def removed(self, cut: Cut) -> list[str]:
        """The paths of the modules that a cut takes out of training's memory."""
        ...

    def behind(self, cut: Cut) -> list[str]:
        """The paths of the modules that the base path does not run."""
        ...

    def leaves_attention(self, cut: Cut) -> bool:
        """Whether there is still attention, where a LoRA usually is."""
        ...

    def stored_shapes(self, cut: Cut, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """What a record keeps, tensor by tensor without the batch, for latents of height × width."""
        ...

    def inputs(self, height: int, width: int) -> tuple[Tensor, Conditioning]:
        """Latents (1, channels, height, width) and a prompt of the usual length, with any content."""
        ...

    def base(self, cut: Cut) -> BasePath:
        """The network up to the exit; a view, as `hollow` gives. Raises HollowError as `check_cut` does."""
        ...

    def hollow(self, cut: Cut, timesteps: Iterable[int] | None) -> "Network":
        """The network without what the cut takes out; nothing is copied, and the rest is freed with the whole.

        `timesteps` are those that will be asked for; None allows any. Raises HollowError as `check_cut` does.
        """
        ...

    def predict(self, noisy: Tensor, timesteps: Sequence[int], conditioning: Conditioning, stored: Stored) -> Tensor:
        """What it predicts of `noisy` latents (batch, channels, height, width), one time step each; in float32.

        `stored` is what the base path has left for them, its tensors (batch, …); empty while the network is whole.
        """
        ...

    def checkpoint(self, levels: int | None) -> None:
        """Let backward passes compute anew what would be kept, in so many of `levels`, those first that keep most;
        None: in all."""
        ...


def read_cut(cut: object) -> Cut | None:
    """A cut as JSON has it, where a pair is a list; anything else stays as it is."""
    return cast(Cut, tuple(cut) if isinstance(cut, list) else cut)


def cut_in_words(cut: Cut) -> str:
    """ "3", of a pair "4,6"."""
    return ",".join(map(str, cut)) if isinstance(cut, tuple) else str(cut)


def at_cut(network: Network, cut: Cut | None, timesteps: Iterable[int] | None) -> Network:
    """A whole network as it is trained: hollowed at the cut, for `timesteps`; None leaves it whole."""
    return network if cut is None else network.hollow(cut, timesteps)


def removed_fraction(network: Network, cut: Cut) -> float:
    """The share of a whole network's parameters that training no longer holds, from 0 to 1."""
    gone = tuple(f"{path}." for path in network.removed(cut))
    sizes = {name: parameter.numel() for name, parameter in network.module.named_parameters()}
    return sum(size for name, size in sizes.items() if name.startswith(gone)) / sum(sizes.values())
