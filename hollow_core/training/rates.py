"""How the learning rate goes along a training."""

from collections.abc import Callable
from typing import Literal

import torch

LRSchedule = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]

RESTARTS = 3
"""How often "cosine_with_restarts" falls from the full rate to nothing; once would be "cosine"."""
POWER = 2.0
""" "polynomial" falls with this power of the steps that are left; 1 would be "linear"."""


def rate_factor(name: LRSchedule, steps: int, warmup: int = 0) -> Callable[[int], float]:
    """What the learning rate is multiplied with in the step before which so many are done, by diffusers' schedule of
    this name: over the first `warmup` steps it rises from 0, then goes down to 0 after `steps`, or stays."""
    from diffusers.optimization import get_scheduler

    unit = torch.optim.SGD([torch.nn.Parameter(torch.empty(0))], lr=1.0)
    scheduler = get_scheduler(
        "constant_with_warmup" if name == "constant" and warmup else name,
        unit,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        num_cycles=RESTARTS,
        power=POWER,
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor
