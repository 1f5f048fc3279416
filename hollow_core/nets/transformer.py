"""A transformer as a `Network`: without its ends, which a stored state and a stored residual stand for.

Of L blocks a cut (n, m) takes out [0, n) and [L − m, L) (DiT-BlockSkip, CVPR 2026, arXiv 2603.20755). A record keeps
f(n), what enters the first block that stays, of every stream; and, of the image's tokens, the residual f(L) − f(L − m),
which is added behind the last one. With frozen embedders and no LoRA before it f(n) is exact; the residual is that of
the frozen network.

A view is a shallow copy whose lists of blocks hold other items under the names of the whole, so no weight is copied,
and a LoRA has the same names in all of them.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import HollowError
from .conditioning import Conditioning
from .families import Family, family_of
from .families.family import Streams
from .network import Cut, Stored, Targets
from .transfer import send

RESIDUAL, STATE = "residual", "state"
"""What a record keeps: of the back, and of the front where image and text are joined; else "image" and "text"."""

LEVELS = 4
"""Parts of the blocks that can recompute by themselves."""

SHARES = (10, 20, 30, 40, 50, 60, 70, 80)
"""Percent of the parameters that `cuts` come nearest to."""


@dataclass(frozen=True)
class Transformer:
    """A `Network` of one of the families. Its cuts are pairs (n, m): so many blocks of the front and of the back."""

    module: Any
    """Of diffusers' class, whole, or as `hollow` gives it."""

    @property
    def family(self) -> Family:
        """What is known of its kind. Raises HollowError for one that is not."""
        return family_of(type(self.module).__name__)

    @property
    def cut(self) -> Cut | None:
        """At which it was hollowed; None while it is whole."""
        return getattr(self.module, "cut", None)

    @property
    def config(self) -> Mapping[str, Any]:
        """As diffusers writes it, with the class."""
        return {**self.module.config, "_class_name": type(self.module).__name__}

    @property
    def dtype(self) -> torch.dtype:
        """Of its arithmetic."""
        return self._weight.dtype

    @property
    def record_dtype(self) -> torch.dtype:
        """That of its arithmetic, where nothing is lost by it; the states of large ones overflow in float16."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16

    @property
    def usual_cut(self) -> Cut:
        """That which removes about half of the parameters, of both ends evenly."""
        return self.nearest_cut(0.5)

    @property
    def levels(self) -> int:
        """Parts of the blocks."""
        return LEVELS

    @property
    def token_side(self) -> int:
        """Latents to a side of a token."""
        return 2

    @property
    def within(self) -> tuple[str, ...]:
        """The beginnings of the paths where a LoRA may be: the blocks, not what is before and behind."""
        return tuple(f"{blocks.path}." for blocks in self.family.blocks)

    @property
    def targets(self) -> Targets:
        """The family's, but for those that only blocks had which a cut has taken out."""
        paths = [f".{path}" for path, module in self.module.named_modules() if isinstance(module, nn.Linear)]
        attention, feed_forward = (
            tuple(name for name in names if any(path.endswith(f".{name}") for path in paths))
            for names in (self.family.attention, self.family.feed_forward)
        )
        return Targets(attention, (*attention, *feed_forward))

    @property
    def kept(self) -> tuple[str, ...]:
        """Layers that are never quantised or streamed, as they are small."""
        return self.family.kept

    def check_inputs(self, name: str, latents: Tensor, prompts: Sequence[Conditioning]) -> None:
        """Raises HollowError unless latents are (1, channels, height, width) of even sides, and prompts as wide as they
        must be."""
        shape, channels, title = tuple(latents.shape), self.family.channels(self.config), self.family.title
        if len(shape) != 4 or shape[:2] != (1, channels) or shape[2] % 2 or shape[3] % 2:
            raise HollowError(
                f"The latents of {name} have shape {shape}, but {title} takes (1, {channels}, height, width) with even "
                "sides. Encode one picture at a time with the model's own VAE."
            )
        expected = self.family.text_shape(self.config)
        for conditioning in prompts:
            width = tuple(conditioning.encoder_hidden_states.shape[2:])
            if width != expected:
                raise HollowError(
                    f"The prompts of {name} are {_times(width)} wide, but {title} takes {_times(expected)}. "
                    "Use the model's own text encoder."
                )

    def cuts(self) -> list[Cut]:
        """Of both ends evenly, those whose shares of the parameters come nearest to 10 %, 20 % and so on."""
        even = self._even_cuts
        return list(dict.fromkeys(min(even, key=lambda cut: abs(even[cut] - wanted)) for wanted in SHARES))

    def nearest_cut(self, share: float) -> Cut:
        """Of both ends evenly, whose share of the parameters, from 0 to 1, comes nearest."""
        even = self._even_cuts
        return min(even, key=lambda cut: abs(even[cut] - 100 * share))

    @cached_property
    def _even_cuts(self) -> dict[Cut, float]:
        """Percent of the parameters, by the cut that takes most alike from both ends, for every number of blocks."""
        blocks, network = self.listed(), self.module
        sizes = [_size(block.module) for block in blocks]
        refiners, total = sum(_size(network.get_submodule(path)) for path in self.family.refiners), _size(network)
        share: dict[Cut, float] = {}
        for number in range(1, len(blocks)):
            ends = {
                (n, number - n): (refiners + sum(sizes[:n]), sum(sizes[len(sizes) - number + n :]))
                for n in range(number + 1)
            }
            evenly = min(ends, key=lambda cut: abs(ends[cut][0] - ends[cut][1]))
            share[evenly] = 100 * sum(ends[evenly]) / total
        return share

    def check_cut(self, cut: Cut) -> None:
        """Raises HollowError unless some block goes and some stays."""
        length, title = len(self.listed()), self.family.title
        advice = f"Take {length // 4},{length // 4}, for example."
        if isinstance(cut, int):
            raise HollowError(
                f"{title} is cut at both ends, but cut {cut} is one number. Give two: how many of its {length} blocks "
                f"go at the front, and how many at the back. {advice}"
            )
        n, m = cut
        if n < 0 or m < 0 or not 0 < n + m < length:
            raise HollowError(
                f"There is no cut {n},{m}: this {title} has {length} blocks, of which at least one must go and one "
                f"stay. {advice}"
            )

    def blocks(self, cut: Cut) -> list[str]:
        """By diffusers' names."""
        n, m = self._ends(cut)
        blocks = self.listed()
        return [
            *self.family.refiners,
            *(f"{block.path}.{block.name}" for block in (*blocks[:n], *blocks[-m or len(blocks) :])),
        ]

    def removed(self, cut: Cut) -> list[str]:
        """Paths of modules: the blocks of both ends, and what refines image and text before them."""
        return self.blocks(cut)

    def behind(self, cut: Cut) -> list[str]:
        """Paths of modules: where nothing of the back goes, all blocks behind the front."""
        n, m = self._ends(cut)
        return [] if m else [f"{block.path}.{block.name}" for block in self.listed()[n:]]

    def leaves_attention(self, cut: Cut) -> bool:
        """Every block has attention."""
        return True

    def stored_shapes(self, cut: Cut, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """(tokens, width) of each stream and of the residual, for a prompt of the usual length."""
        n, m = self._ends(cut)
        family, channels, enters = self.family, self._channels, self.listed()[n].streams
        image = height * width // 4
        tokens = {"image": image, "text": family.prompt_tokens}
        if enters not in ("image", "two"):
            joined = sum(-(-number // family.multiple) * family.multiple for number in tokens.values())
            tokens = {STATE: joined}
        kept: dict[str, tuple[int, ...]] = {name: (tokens[name], channels) for name in _names(enters)}
        return kept | ({RESIDUAL: (image, channels)} if m else {})

    def inputs(self, height: int, width: int) -> tuple[Tensor, Conditioning]:
        """Latents (1, channels, height, width) and a prompt of the usual length, of zeros."""
        config, family = self.config, self.family
        pooled = family.pooled_width(config)
        prompt = torch.zeros(1, family.prompt_tokens, *family.text_shape(config))
        latents = torch.zeros(1, family.channels(config), height, width)
        return latents, Conditioning(prompt, None if pooled is None else torch.zeros(1, pooled))

    def base(self, cut: Cut) -> "TransformerBasePath":
        """Both ends and what is between, or the front alone where nothing of the back goes. Raises HollowError as
        `check_cut` does."""
        n, m = self._ends(cut)
        blocks = self.listed()
        enter = Tap(blocks[n].streams)
        items = [*blocks[:n], blocks[n]._replace(name="enter", module=enter)]
        if not m:
            return TransformerBasePath(Transformer(self.view(items)), enter)
        before, after = (Tap(block.streams) for block in (blocks[-m - 1], blocks[-1]))
        items += [*blocks[n:-m], blocks[-m - 1]._replace(name="before", module=before)]
        items += [*blocks[-m:], blocks[-1]._replace(name="after", module=after)]
        return TransformerBasePath(Transformer(self.view(items)), enter, before, after)

    def hollow(self, cut: Cut, timesteps: Iterable[int] | None) -> "Transformer":
        """What is between the ends, with all that is before and behind the blocks, but for refiners. Whatever
        `timesteps` are, any may be asked for. Raises HollowError as `check_cut` does."""
        n, m = self._ends(cut)
        blocks = self.listed()
        kept = blocks[n : len(blocks) - m]
        items = [kept[0]._replace(name="enter", module=Enter(kept[0].streams)), *kept]
        if m:
            items.append(kept[-1]._replace(name="leave", module=Leave(kept[-1].streams)))
        view = self.view(items, without=self.family.refiners)
        view.cut = (n, m)
        return Transformer(view)

    def predict(self, noisy: Tensor, timesteps: Sequence[float], conditioning: Conditioning, stored: Stored) -> Tensor:
        """ε − x₀ of `noisy` latents (batch, channels, height, width), each at σ = time step / 1000; in float32. Raises
        HollowError for records that were made for another kind of network."""
        enter, leave = ([each for each in self._items() if isinstance(each, kind)] for kind in (Enter, Leave))
        expected = {name for each in enter for name in _names(each.streams)} | {RESIDUAL for _ in leave}
        if stored.keys() != expected:
            raise HollowError(
                f"The records do not hold what {self.family.title} of cut {self.cut} needs (None: not hollowed). "
                "Precompute them for this cut and this kind of model."
            )
        handed_in = {name: send(tensor, self._weight.device, self.dtype) for name, tensor in stored.items()}
        for each in enter:
            each.state = tuple(handed_in[name] for name in _names(each.streams))
        for each in leave:
            each.residual = handed_in[RESIDUAL]
        try:
            return self._forward(noisy, timesteps, conditioning)
        finally:
            for each in (*enter, *leave):
                each.let_go()

    def checkpoint(self, levels: int | None) -> None:
        """Let backward passes compute anew what blocks would keep, in so many quarters of them from the first; None: in
        all."""
        blocks = [item for item in self._items() if not isinstance(item, Item)]
        recomputed = set(blocks if levels is None else blocks[: -(-len(blocks) * levels // LEVELS)])

        def call(block: nn.Module, *arguments: Any) -> Any:
            return checkpoint(block, *arguments, use_reentrant=False) if block in recomputed else block(*arguments)

        self.module.enable_gradient_checkpointing(call)
        self.__dict__.pop("_called", None)  # a view of before, which would not know of it

    def _forward(self, noisy: Tensor, timesteps: Sequence[float], conditioning: Conditioning) -> Tensor:
        height, width = noisy.shape[-2:]
        for item in self._items():
            if isinstance(item, Item):
                item.image_tokens = height * width // 4
        device, config, family = self._weight.device, self.config, self.family
        sigmas = send(torch.tensor(timesteps, dtype=torch.float32) / 1000, device)
        told = family.arguments(config, send(noisy, device, self.dtype), sigmas, conditioning.to(device, self.dtype))
        crop = conditioning.crop
        called = self._called if crop is None else family.called(self.module, crop)
        out = called(**told, return_dict=False)[0]
        return family.velocity(config, out, (height, width)).float()

    @cached_property
    def _called(self) -> Any:
        """In the network's place for whole pictures; the same each time, as streaming knows it by its last pass."""
        return self.family.called(self.module, None)

    @property
    def _weight(self) -> Tensor:
        """Which stays as it is where others are quantised or streamed."""
        weight: Tensor = next(self.module.get_submodule(self.family.kept[0]).parameters())
        return weight

    @property
    def _channels(self) -> int:
        """Of a token."""
        return self.family.width(self.config)

    def _items(self) -> Iterator[nn.Module]:
        """What the lists of blocks hold."""
        return (item for blocks in self.family.blocks for item in self.module.get_submodule(blocks.path))

    def listed(self) -> list["Block"]:
        """Its blocks, in the order in which they run."""
        return [
            Block(blocks.path, name, blocks.streams, module)
            for blocks in self.family.blocks
            for name, module in self.module.get_submodule(blocks.path).named_children()
        ]

    def _ends(self, cut: Cut) -> tuple[int, int]:
        self.check_cut(cut)
        assert not isinstance(cut, int)
        return cut

    def view(self, items: Sequence["Block"], without: Sequence[str] = ()) -> Any:
        """Of the network, with these in its lists of blocks, and nothing in the lists `without`."""
        view = copy.copy(self.module)
        view.__dict__.pop("forward", None)  # an offloading hook's wrapper, which would run the original
        view._modules = dict(self.module._modules)
        for path in (*without, *(blocks.path for blocks in self.family.blocks)):
            held = nn.ModuleList()
            held._modules = {item.name: item.module for item in items if item.path == path}
            view._modules[path] = held
        return view


@dataclass(frozen=True)
class TransformerBasePath:
    """What `Transformer.base` gives, as a `BasePath`."""

    network: Transformer
    enter: "Tap"
    before: "Tap | None" = None
    after: "Tap | None" = None

    @property
    def module(self) -> nn.Module:
        """What must be on the device while it runs."""
        return cast(nn.Module, self.network.module)

    @property
    def sees_identifier(self) -> bool:
        """What enters the first block that stays is then exact."""
        return True

    @torch.no_grad()
    def __call__(self, noisy: Tensor, timesteps: Sequence[int], conditioning: Conditioning) -> Stored:
        """The state that enters the first block that stays, by stream, (batch, tokens, width) each, and the residual of
        the image's tokens."""
        taps = [tap for tap in (self.enter, self.before, self.after) if tap is not None]
        try:
            self.network._forward(noisy, timesteps, conditioning)
            kept = dict(zip(_names(self.enter.streams), self.enter.passed, strict=True))
            if self.before is not None and self.after is not None:
                kept[RESIDUAL] = self.after.image - self.before.image
            return kept
        finally:
            for tap in taps:
                tap.let_go()


class Block(NamedTuple):
    """One in a list."""

    path: str
    """Of the list."""
    name: str
    """In the list."""
    streams: Streams
    module: nn.Module


class Item(nn.Module):
    """Stands in a list of blocks, and is called as they are."""

    image_tokens: int

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.streams = streams

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """What a block gives back, of what it is given."""
        first, *others = arguments or (named["hidden_states"],)
        if self.streams != "two":
            return self.handle(first)[0]
        image, text = self.handle(first, others[0] if others else named["encoder_hidden_states"])
        return text, image

    def handle(self, *streams: Tensor) -> tuple[Tensor, ...]:
        """The streams, the image's first, as they come out."""
        raise NotImplementedError

    def let_go(self) -> None:
        """Of all tensors."""
        raise NotImplementedError

    def of_image(self, tokens: Tensor) -> tuple[int, int]:
        """From where to where the image's tokens are."""
        if self.streams == "text first":
            return tokens.shape[1] - self.image_tokens, tokens.shape[1]
        return 0, self.image_tokens


class Tap(Item):
    """Keeps what passes."""

    passed: tuple[Tensor, ...] = ()

    def handle(self, *streams: Tensor) -> tuple[Tensor, ...]:
        self.passed = streams
        return streams

    def let_go(self) -> None:
        self.passed = ()

    @property
    def image(self) -> Tensor:
        """Its tokens."""
        first, end = self.of_image(self.passed[0])
        return self.passed[0][:, first:end]


class Enter(Item):
    """Hands in the stored state in place of what passes."""

    state: tuple[Tensor, ...] = ()

    def handle(self, *streams: Tensor) -> tuple[Tensor, ...]:
        return self.state

    def let_go(self) -> None:
        self.state = ()


class Leave(Item):
    """Adds the stored residual to the image's tokens."""

    residual: Tensor | None = None

    def handle(self, *streams: Tensor) -> tuple[Tensor, ...]:
        first, *others = streams
        assert self.residual is not None
        start, end = self.of_image(first)
        parts = [first[:, :start], first[:, start:end] + self.residual, first[:, end:]]
        return (torch.cat(parts, dim=1) if len(first[0]) > self.image_tokens else parts[1], *others)

    def let_go(self) -> None:
        self.residual = None


def _names(streams: Streams) -> tuple[str, ...]:
    """Of the tensors that a record keeps of the state."""
    return {"image": ("image",), "two": ("image", "text")}.get(streams, (STATE,))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _times(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes))
