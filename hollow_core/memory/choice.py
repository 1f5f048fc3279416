"""What a run takes where nobody says: the least hollowing and the fastest settings that fit into what is free."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from ..training.settings import Precision
from .planner import Fit, Planner
from .setting import Setting


def choose(
    planner: Planner, room: int, setting: Setting, *, named: Collection[str], precisions: Sequence[Precision]
) -> Fit:
    """`Planner.fit` into `room` bytes, where the `named` stay as they are in `setting`: cut, precision, and what `fit`
    can leave fixed.

    Records pass together if nothing else is said, as many as a step has; `precisions` are tried in their order.
    Raises HollowError where nothing fits.
    """
    training = setting.training
    if "together" not in named:
        training = replace(training, together=setting.step_records)
    return planner.fit(
        room,
        replace(setting, training=training),
        precisions=[training.precision] if "precision" in named else precisions,
        cuts=[setting.cut] if "cut" in named else None,
        fixed=named,
    )


def precisions_for(device: torch.device, setting: Setting) -> tuple[Precision, ...]:
    """Which to try, the best first: bf16 on a GPU that computes in it, fp32 and then fp16 on one that does not."""
    if device.type != "cuda":
        return "fp32", "bf16"
    if has_bf16(device):
        return ("bf16",)
    return ("fp32",) if setting.training.fused_backward else ("fp32", "fp16")  # a fused step finds no overflow


def has_bf16(device: torch.device) -> bool:
    """Whether this GPU computes in bf16 itself, not by emulation."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
