"""AdamW over the LoRA: its states in 32 or 8 bits, its step after the backward pass or fused into it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import HollowError

OptimizerName = Literal["adamw", "adamw8bit"]


class Optimizer:
    """AdamW, or bitsandbytes' with its two moments in 8 bits, block by block (Dettmers et al. 2022).

    With `fused` each parameter is updated as soon as its gradient is complete, and the gradient let go: so never
    more than one is there. The gradient must then be that of one backward pass, and cannot be clipped, as its
    norm is known too late. Raises HollowError where bitsandbytes is missing.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        name: OptimizerName = "adamw",
        *,
        learning_rate: float,
        weight_decay: float,
        fused: bool = False,
    ) -> None:
        make = partial(optimizer_class(name, parameters[0].is_meta), lr=learning_rate, weight_decay=weight_decay)
        self.parameters, self.fused = parameters, fused
        self._optimizers = [make([parameter]) for parameter in parameters] if fused else [make(parameters)]
        one_each = self._optimizers if fused else self._optimizers * len(parameters)
        self._pairs = list(zip(parameters, one_each, strict=True))
        self._squared_norm = torch.zeros(())
        self.begun = False
        """Whether the backward pass under way has updated anything yet."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, fused updates happen in backward passes; others wait for `step`."""
        self._squared_norm, self.begun = torch.zeros(()), False
        with ExitStack() as hooks:
            for parameter, optimizer in self._pairs:
                parameter.grad = None
                if self.fused:
                    hook = parameter.register_post_accumulate_grad_hook(partial(self._consume, optimizer))
                    hooks.callback(hook.remove)
            yield

    def clip(self, max_norm: float) -> Tensor:
        """The norm of the gradient, which is scaled down to `max_norm` if it is longer and not consumed yet."""
        if self.fused:
            return self._squared_norm.sqrt()
        return nn.utils.clip_grad_norm_(self.parameters, max_norm)

    def step(self) -> None:
        """Update what was not updated in the backward pass."""
        if not self.fused:
            self._optimizers[0].step()

    def state(self) -> dict[int, dict[str, Tensor]]:
        """A snapshot on the CPU of all that `load` needs to go on: {index of the parameter: {part: tensor}}."""
        return {
            index: {part: torch.as_tensor(value).to("cpu", copy=True) for part, value in state.items()}
            for index, (parameter, optimizer) in enumerate(self._pairs)
            if (state := optimizer.state.get(parameter))
        }

    def load(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Go on from what `state` gave."""
        for index, parts in state.items():
            parameter, optimizer = self._pairs[index]
            optimizer.state[parameter] = {part: _restored(value, parameter.device) for part, value in parts.items()}

    def _consume(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.begun = True
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self._squared_norm = self._squared_norm.to(norm.device) + norm.square()
        optimizer.step()
        parameter.grad = None


def _restored(value: Tensor, device: torch.device) -> Tensor | float:
    """A part of a state; the number of steps is on the CPU to torch, and no tensor to bitsandbytes."""
    if value.dim():
        return value.to(device)
    return value.clone() if value.is_floating_point() else value.item()


def optimizer_class(name: OptimizerName, dry_run: bool = False) -> Callable[..., torch.optim.Optimizer]:
    """The class of an optimizer, in a dry run a stand-in for it. Raises HollowError where bitsandbytes is missing."""
    if name == "adamw":
        return torch.optim.AdamW
    if dry_run:
        return AdamW8bitStates
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise HollowError(
            "The optimizer adamw8bit needs bitsandbytes. Install it (pip install 'hollow[bitsandbytes]'), or use adamw."
        ) from error
    return AdamW8bit


class AdamW8bitStates(torch.optim.Optimizer):
    """What bitsandbytes' AdamW8bit keeps, whose kernels know no meta device: two bytes an element and a scale
    for each block of 256 in both moments; 32 bits where a parameter has less than 4096 elements. It does nothing.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Makes the states."""
        for parameter in (each for group in self.param_groups for each in group["params"] if each.grad is not None):
            size, state = parameter.numel(), self.state[parameter]
            if state:
                continue
            for number in (1, 2):
                moment = torch.float32 if size < 4096 else torch.uint8
                state[f"state{number}"] = torch.zeros_like(parameter, dtype=moment)
                if size >= 4096:
                    state[f"absmax{number}"] = torch.zeros(-(-size // 256), device=parameter.device)
