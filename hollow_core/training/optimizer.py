"""What updates the LoRA, after the backward pass or fused into it: AdamW, its states in 32 or 8 bits, and others."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import HollowError

OptimizerName = Literal["adamw", "adamw8bit", "prodigy", "adafactor", "lion", "schedulefree"]

USUAL_RATES: dict[OptimizerName, float] = {
    "adamw": 1e-4,
    "adamw8bit": 1e-4,
    "prodigy": 1.0,  # a factor of the rate that it finds
    "adafactor": 1e-4,
    "lion": 3e-5,  # every number moves by the whole rate
    "schedulefree": 3e-4,  # its average calms it
}
"""The learning rate of each, where none is given."""

ALL_AT_ONCE: tuple[OptimizerName, ...] = ("prodigy", "schedulefree")
"""Those that know one thing about all matrices together: how far they are, or how much each step counts."""

_PACKAGED: dict[OptimizerName, tuple[str, dict[str, Any]]] = {
    # its rate begins at d0 and grows: from 1e-5, lower than a LoRA's ever is, it is there in fewer steps
    "prodigy": ("Prodigy", {"betas": (0.9, 0.99), "d0": 1e-5, "bias_correction": True, "safeguard_warmup": True}),
    "adafactor": ("AdaFactor", {"betas": (None, 0.999), "scale_parameter": False, "relative_step": False}),
    "lion": ("Lion", {"betas": (0.9, 0.99)}),
    "schedulefree": ("ScheduleFreeAdamW", {}),
}
"""Those of the package pytorch-optimizer, with what is usual for a LoRA."""

_GROUP = "group"  # of a state, beside the numbers of the parameters


class Optimizer:
    """AdamW, or bitsandbytes' with its two moments in 8 bits, block by block (Dettmers et al. 2022); or by the package
    pytorch-optimizer, Prodigy (Mishchenko & Defazio 2023), which finds its rate itself and waits for the device as it
    does, Adafactor at a fixed rate without momentum (Shazeer & Stern 2018), Lion (Chen et al. 2023), or schedule-free
    AdamW (Defazio et al. 2024), whose LoRA to use is an average that `use_averages` brings.

    With `fused` each parameter is updated as soon as its gradient is complete, and the gradient let go: so never
    more than one is there. The gradient must then be that of one backward pass, and cannot be clipped, as its
    norm is known too late; nor does it go with those of `ALL_AT_ONCE`. Raises HollowError where a package is missing.
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
        make = partial(optimizer_class(name, parameters[0].device.type), lr=learning_rate, weight_decay=weight_decay)
        self.parameters, self.fused, self.averages = parameters, fused, name == "schedulefree"
        self._name = name
        self._learning_rate = learning_rate
        self._optimizers = [make([parameter]) for parameter in parameters] if fused else [make(parameters)]
        one_each = self._optimizers if fused else self._optimizers * len(parameters)
        self._pairs = list(zip(parameters, one_each, strict=True))
        self._as_made = dict(self._optimizers[0].param_groups[0])
        self._consumed: list[Tensor] = []  # norms of the gradients that a fused backward pass let go
        self.begun = False
        """Whether the backward pass under way has updated anything yet."""

    def set_rate(self, factor: float) -> None:
        """From here on, go at `factor` times the learning rate."""
        for group in self._groups():
            group["lr"] = self._learning_rate * factor

    @property
    def rate(self) -> float:
        """The learning rate at which it goes now."""
        rate: float = next(self._groups())["lr"]
        return rate

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, fused updates happen in backward passes; others wait for `step`."""
        self._consumed, self.begun = [], False
        with ExitStack() as hooks:
            for parameter, optimizer in self._pairs:
                parameter.grad = None
                if self.fused:
                    hook = parameter.register_post_accumulate_grad_hook(partial(self._consume, optimizer))
                    hooks.callback(hook.remove)
            yield

    def norm(self) -> Tensor:
        """Of the gradient, also where it is consumed: a scalar on its device."""
        norms = self._consumed if self.fused else torch._foreach_norm(self._gradients())
        return torch.linalg.vector_norm(torch.stack([*norms]), dtype=torch.float32)

    def step(self, factor: float = 1.0) -> None:
        """Update what was not updated in the backward pass, by `factor` times the gradient."""
        if self.fused:
            return
        if factor != 1:
            torch._foreach_mul_(self._gradients(), factor)
        self._optimizers[0].step()

    def use_averages(self, use: bool) -> None:
        """Of a schedule-free optimizer: make the parameters its averages, or, but for rounding, what is trained."""
        for optimizer in self._optimizers:
            switch: Any = optimizer
            switch.eval() if use else switch.train()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """A snapshot on the CPU of all that `load` needs to go on: {number of the parameter: {part: tensor}}, and
        what counts for all parameters under "group", where there is anything."""
        states = {
            str(index): {part: torch.as_tensor(value).to("cpu", copy=True) for part, value in state.items()}
            for index, (parameter, optimizer) in enumerate(self._pairs)
            if (state := optimizer.state.get(parameter))
        }
        of_all = {
            part: _snapshot(value)
            for part, value in next(self._groups()).items()  # one for each parameter if fused, but all alike
            if part != "lr" and _counts(value, self._as_made.get(part))
        }
        return states | ({_GROUP: of_all} if of_all else {})

    def misfit(self, state: Mapping[str, Mapping[str, Tensor]]) -> str | None:
        """Why `load` could not go on from this, in words; None where it can."""
        alike: dict[torch.Size, dict[str, tuple[torch.Size, torch.dtype]]] = {}
        for index, parts in state.items():
            if index == _GROUP:
                continue
            if not (index.isdecimal() and int(index) < len(self.parameters)):
                return f"its optimizer has a state for matrix {index}, but there are {len(self.parameters)}"
            matrix = self.parameters[int(index)]
            found = usual = {part: (tensor.shape, tensor.dtype) for part, tensor in parts.items()}
            if self._name == "adamw":  # whose kernel crashes the process where they are others
                moment = (matrix.shape, matrix.dtype)
                usual = {"step": (torch.Size(), torch.float32), "exp_avg": moment, "exp_avg_sq": moment}
            if found != alike.setdefault(matrix.shape, usual):
                return f"its optimizer's state for matrix {index} lacks a part, or has one of another shape"
        return None

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from what `state` gave, where it has no `misfit`."""
        for index, parts in state.items():
            if index == _GROUP:
                for group in self._groups():
                    group |= {part: _of_group(value, self.parameters[0].device) for part, value in parts.items()}
                continue
            parameter, optimizer = self._pairs[int(index)]
            steps_there = bool(optimizer.defaults.get("fused"))
            optimizer.state[parameter] = {
                part: _restored(value, parameter.device, steps_there) for part, value in parts.items()
            }

    def _groups(self) -> Iterator[dict[str, Any]]:
        """One of each optimizer."""
        return (optimizer.param_groups[0] for optimizer in self._optimizers)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def _consume(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.begun = True
        self._consumed.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        optimizer.step()
        parameter.grad = None


def _counts(value: Any, as_made: Any) -> bool:
    """Whether a part of a group is what it has come to on the way."""
    return isinstance(value, Tensor) or (isinstance(value, int | float) and value != as_made)


def _snapshot(value: Any) -> Tensor:
    """Of a part of a group, exactly."""
    if isinstance(value, Tensor):
        return value.to("cpu", copy=True)
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def _of_group(value: Tensor, device: torch.device) -> Any:
    """What `_snapshot` was made of: a number, or a tensor of more than none dimensions."""
    return value.to(device, copy=True) if value.dim() else value.item()


def _restored(value: Tensor, device: torch.device, steps_there: bool) -> Tensor | float:
    """A part of a state. The number of steps is where the parameter is to torch's fused AdamW, on the CPU to another,
    and no tensor to bitsandbytes."""
    if value.dim() or steps_there:
        return value.to(device, copy=True)
    return value.clone() if value.is_floating_point() else value.item()


def optimizer_class(name: OptimizerName, device: str = "cpu") -> Callable[..., torch.optim.Optimizer]:
    """What makes an optimizer for parameters on a kind of device; on "meta", in a dry run, a stand-in for it. Raises
    HollowError where the optimizer's package is missing."""
    if name in _PACKAGED:
        return _packaged(name)
    if device == "meta":
        return AdamWStates if name == "adamw" else AdamW8bitStates
    if name == "adamw":
        return partial(torch.optim.AdamW, fused=device in ("cpu", "cuda") or None)  # one kernel for all; else by itself
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise HollowError(
            "The optimizer adamw8bit needs bitsandbytes. Install it (pip install 'hollow[bitsandbytes]'), or use adamw."
        ) from error
    return AdamW8bit


def _packaged(name: OptimizerName) -> Callable[..., torch.optim.Optimizer]:
    """What makes one of pytorch-optimizer's, on any kind of device: in a dry run, too, it is the real one."""
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise HollowError(
            f"The optimizer {name} needs pytorch-optimizer. "
            "Install it (pip install 'hollow[optimizers]'), or use adamw."
        ) from error
    spelling, usual = _PACKAGED[name]
    kind = getattr(pytorch_optimizer, spelling)

    def make(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        # a kernel for all matrices, in versions that have it: by themselves some take it on CUDA alone
        group = {"params": list(parameters), "foreach": True}
        optimizer: torch.optim.Optimizer = kind([group], lr=lr, weight_decay=weight_decay, **usual)
        return optimizer

    return make


class AdamWStates(torch.optim.Optimizer):
    """What AdamW keeps: two moments in the parameter's precision, and a number of steps. It does nothing, as its kernel
    makes no more."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Makes the states."""
        for parameter in (each for group in self.param_groups for each in group["params"] if each.grad is not None):
            if not self.state[parameter]:
                self.state[parameter] = self.states(parameter)

    def states(self, parameter: Tensor) -> dict[str, Tensor]:
        """Of one parameter."""
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        return moments | {"step": torch.zeros((), device=parameter.device)}


class AdamW8bitStates(AdamWStates):
    """What bitsandbytes' AdamW8bit keeps, whose kernels know no meta device: two bytes an element and a scale
    for each block of 256 in both moments; 32 bits where a parameter has less than 4096 elements.
    """

    def states(self, parameter: Tensor) -> dict[str, Tensor]:
        """Of one parameter."""
        size = parameter.numel()
        moment = torch.float32 if size < 4096 else torch.uint8
        states = {f"state{number}": torch.zeros_like(parameter, dtype=moment) for number in (1, 2)}
        if size >= 4096:
            scales = {f"absmax{number}": torch.zeros(-(-size // 256), device=parameter.device) for number in (1, 2)}
            states |= scales
        return states
