"""The LoRA as it is to be used, where that is another than the one that is trained."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..nets.transfer import Copies
from .optimizer import Optimizer

_STEP = "step"  # of the state, beside the numbers of the parameters


class Averages:
    """Of the LoRA along the training: EMA by diffusers, or what a schedule-free optimizer has itself. Where there is
    neither, the LoRA is used as it is trained, and nothing here costs anything.

    EMA keeps a copy in fp32 where the parameters are. After n + 1 updates the last counts 1 - min(decay, (1 + n) /
    (10 + n)): so a short training is not held back by where it began.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], optimizers: Sequence[Optimizer], decay: float | None
    ) -> None:
        self._parameters = list(parameters)
        self._optimizers = [optimizer for optimizer in optimizers if optimizer.averages]
        self._ema = None
        if decay is not None:
            from diffusers.training_utils import EMAModel

            self._ema = EMAModel(self._parameters, decay=decay, foreach=True)
            self._ema.to(dtype=torch.float32)  # bf16 would round away what is new

    def follow(self) -> None:
        """Take in the parameters, after each update. Nothing waits for the device."""
        if self._ema is not None:
            self._ema.step(self._parameters)

    def use(self) -> None:
        """Make the parameters for good what they are to be used as, at the end of a training."""
        for optimizer in self._optimizers:
            optimizer.use_averages(True)
        if self._ema is not None:
            self._ema.copy_to(self._parameters)

    @contextmanager
    def as_used(self) -> Iterator[None]:
        """While inside, the parameters are what they are to be used as; afterwards those of before, bit by bit."""
        if self._ema is None and not self._optimizers:
            yield
            return
        trained = Copies(self._parameters)
        trained.take()
        self.use()
        try:
            yield
        finally:
            for optimizer in self._optimizers:
                optimizer.use_averages(False)  # whose way back rounds
            trained.give_back()

    def state(self) -> dict[str, Tensor]:
        """A snapshot of EMA on the CPU, all that `load` needs to go on; schedule-free's is in the optimizer's."""
        if self._ema is None:
            return {}
        averages = {str(index): each.to("cpu", copy=True) for index, each in enumerate(self._ema.shadow_params)}
        return averages | {_STEP: torch.tensor(self._ema.optimization_step)}

    def misfit(self, state: Mapping[str, Tensor]) -> str | None:
        """Why `load` could not go on from this, in words; None where it can."""
        fit = {name: tensor.shape for name, tensor in state.items()} == {
            name: tensor.shape for name, tensor in self.state().items()
        }
        return None if fit else "its averages are not those of its LoRA"

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave, where it has no `misfit`."""
        if self._ema is not None:
            self._ema.optimization_step = int(state[_STEP])
            for index, average in enumerate(self._ema.shadow_params):
                average.copy_(state[str(index)])
