"""Other ways to take blocks out of a transformer, to compare with: each is a `Network`, trained by the same code."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hollow_core.lora.layers import layers_of_any_lora, lora_off
from hollow_core.nets.conditioning import Conditioning
from hollow_core.nets.network import BasePath, Cut, Stored
from hollow_core.nets.transformer import RESIDUAL, Item, Tap, Transformer, TransformerBasePath

FEATURE = "feature"
"""What a record keeps of a middle: what comes out of it, or, as a residual, what it adds."""


class WithoutResidual(Transformer):
    """Both ends go as always, but nothing stands for the back."""

    def base(self, cut: Cut) -> TransformerBasePath:
        """It leaves zeros in the residual's place."""
        path = super().base(cut)
        return _Zeroed(path.network, path.enter, path.before, path.after)


class _Zeroed(TransformerBasePath):
    def __call__(self, noisy: Tensor, timesteps: Sequence[int], conditioning: Conditioning) -> Stored:
        stored = super().__call__(noisy, timesteps, conditioning)
        return {**stored, RESIDUAL: torch.zeros_like(stored[RESIDUAL])}


class MiddleOut(Transformer):
    """A cut (a, b) takes the blocks from a to before b out, as of a U-Net; the ends are trained.

    As the U-Net's recipe has it, what the base path under the generic prompt has of the picture at b is handed in
    there, in place of all that comes from before; the text's tokens, of which a U-Net's features hold none, pass by.
    """

    sees_identifier = False

    def blocks(self, cut: Cut) -> list[str]:
        """Those of the middle."""
        a, b = self._ends(cut)
        return [f"{block.path}.{block.name}" for block in self.listed()[a:b]]

    def behind(self, cut: Cut) -> list[str]:
        """Those after it."""
        _, b = self._ends(cut)
        return [f"{block.path}.{block.name}" for block in self.listed()[b:]]

    def check_cut(self, cut: Cut) -> None:
        """Any."""

    def base(self, cut: Cut) -> TransformerBasePath:
        """Up to b."""
        a, b = self._ends(cut)
        listed = self.listed()
        before, after = Tap(listed[a].streams), Tap(listed[b - 1].streams)
        items = [*listed[:a], listed[a]._replace(name="before", module=before)]
        items += [*listed[a:b], listed[b - 1]._replace(name="after", module=after)]
        return _MiddlePath(Transformer(self.view(items)), before, before, after, of=self)

    def hollow(self, cut: Cut, timesteps: Iterable[int] | None) -> "MiddleOut":
        """Both ends, and between them what hands the middle's picture in."""
        a, b = self._ends(cut)
        listed = self.listed()
        hand_in = listed[a]._replace(name="middle", module=self.item(listed[a].streams))
        view = self.view([*listed[:a], hand_in, *listed[b:]])
        view.cut = (a, b)
        return type(self)(view)

    def predict(self, noisy: Tensor, timesteps: Sequence[float], conditioning: Conditioning, stored: Stored) -> Tensor:
        """As `Transformer.predict`."""
        for item in self._items():
            if isinstance(item, _HandIn):
                item.feature = stored[FEATURE].to(self._weight.device, self.dtype)
        return self._forward(noisy, timesteps, conditioning)

    def kept_of(self, before: Tap, after: Tap) -> Tensor:
        """What a record keeps."""
        return after.image

    @property
    def item(self) -> "type[_HandIn]":
        """What hands it in."""
        return _HandIn


class MiddleResidual(MiddleOut):
    """The same, but what the middle adds to the picture is added, under the personal prompt."""

    sees_identifier = True

    def kept_of(self, before: Tap, after: Tap) -> Tensor:
        """What a record keeps."""
        return after.image - before.image

    @property
    def item(self) -> "type[_HandIn]":
        """What adds it."""
        return _Add


@dataclass(frozen=True, kw_only=True)
class _MiddlePath(TransformerBasePath):
    of: MiddleOut

    @property
    def sees_identifier(self) -> bool:
        return self.of.sees_identifier

    @torch.no_grad()
    def __call__(self, noisy: Tensor, timesteps: Sequence[float], conditioning: Conditioning) -> Stored:
        assert self.before is not None
        assert self.after is not None
        try:
            self.network._forward(noisy, timesteps, conditioning)
            return {FEATURE: self.of.kept_of(self.before, self.after)}
        finally:
            self.before.let_go()
            self.after.let_go()


@dataclass(frozen=True)
class TwoPaths(Transformer):
    """A whole network that predicts as the U-Net's recipe samples: the base path first, without the LoRA and under the
    generic prompt, then both ends with what it has of the picture."""

    middle: tuple[int, int]
    generics: Sequence[tuple[Conditioning, Conditioning]]
    """Personal prompts, each with its generic one; any other prompt stands for itself."""

    @cached_property
    def paths(self) -> tuple[BasePath, MiddleOut]:
        """Both."""
        both = MiddleOut(self.module)
        return both.base(self.middle), both.hollow(self.middle, None)

    def predict(self, noisy: Tensor, timesteps: Sequence[float], conditioning: Conditioning, stored: Stored) -> Tensor:
        """As `Transformer.predict` of a whole network."""
        base, personal = self.paths
        features = []
        with lora_off(layers_of_any_lora(self.module)):
            for row in range(len(noisy)):
                prompt = self._generic(conditioning.encoder_hidden_states[row : row + 1])
                features.append(base(noisy[row : row + 1], [int(timesteps[row])], prompt)[FEATURE])
        return personal.predict(noisy, timesteps, conditioning, {FEATURE: torch.cat(features)})

    def _generic(self, states: Tensor) -> Conditioning:
        pairs = (other for own, other in self.generics if torch.equal(own.encoder_hidden_states, states))
        return next(pairs, Conditioning(states))


class _HandIn(Item):
    feature: Tensor

    def handle(self, *streams: Tensor) -> tuple[Tensor, ...]:
        first, *others = streams
        start, end = self.of_image(first)
        return torch.cat([first[:, :start], self.of_picture(first[:, start:end]), first[:, end:]], dim=1), *others

    def of_picture(self, tokens: Tensor) -> Tensor:
        return self.feature


class _Add(_HandIn):
    def of_picture(self, tokens: Tensor) -> Tensor:
        return tokens + self.feature
