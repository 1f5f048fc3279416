"""What each cut costs: parameters, bytes and operations, counted on tensors that hold no data."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..lora.layers import add_lora, named_lora_parameters, remove_lora
from ..nets.conditioning import Conditioning
from ..nets.network import Cut, Network, Stored, removed_fraction
from .dry_run import Alike

PAPER_RANK = 128
"""The rank at which a training step is counted: that of the paper's main experiments."""

_TIMESTEP = 0  # any


def cuts_table(network: Network, height: int, width: int, cuts: Sequence[Cut] | None = None) -> list[dict[str, Any]]:
    """One JSON-ready row for every cut of a whole network on the meta device, or for these, for latents of
    height × width. The network is frozen then, and otherwise as it was.

    - `k`: the cut, of a transformer a pair
    - `blocks`: the hollowed layers by the paper's names, or diffusers'
    - `removed_percent`: of the parameters, the time-embedding MLP of a U-Net among them
    - `parameters`: how many are kept
    - `stored`: what a record keeps, {name: shape}; of a U-Net the exit activation, without a name, which is also
      `exit_shape`: [channels, height, width]
    - `record_bytes`: its size in fp16
    - `flops`: floating-point operations, a multiply-add counted as two: `full` of the whole network's forward,
      `precompute` of the base path, `hollowed_forward` of the hollowed network without LoRA,
      `training_step` forward and backward with a LoRA of rank 128 on the attention. (The paper's table 3 takes
      twice the forward for the backward; here frozen weights need no gradients. Where a cut leaves no
      attention to train, the step is the forward alone.)

    Raises HollowError for a network that cannot be cut.
    """
    latents, prompt = network.inputs(height, width)
    latents, prompt = latents.to("meta"), prompt.to("meta")
    cuts = network.cuts() if cuts is None else cuts
    for cut in cuts:
        network.check_cut(cut)
    removed = [removed_fraction(network, cut) for cut in cuts]
    total = sum(parameter.numel() for parameter in network.module.parameters())
    with torch.no_grad():
        counts = _flops(network, latents, prompt, {})
    full = counts[""]
    add_lora(network.module, PAPER_RANK, within=network.within, generator=torch.Generator())
    trained = _flops(network, latents, prompt, {}) if any(isinstance(cut, int) for cut in cuts) else {}
    table = []
    for cut, fraction in zip(cuts, removed, strict=True):
        shapes = network.stored_shapes(cut, height, width)
        stored = {name: torch.empty(1, *shape, device="meta") for name, shape in shapes.items()}
        row = {
            "k": cut,
            "blocks": network.blocks(cut),
            "removed_percent": round(100 * fraction, 2),
            "parameters": total - round(fraction * total),
            "stored": {name: list(shape) for name, shape in shapes.items()},
            **({"exit_shape": list(*shapes.values())} if isinstance(cut, int) else {}),
            "record_bytes": 2 * sum(tensor.numel() for tensor in stored.values()),
            "flops": {
                "full": full,
                "precompute": full - _of(network.behind(cut), counts),
                "hollowed_forward": full - _of(network.removed(cut), counts),
                "training_step": _of_training(network, cut, trained, latents, prompt, stored),
            },
        }
        table.append(row)
    remove_lora(network.module)
    return table


def _of_training(
    network: Network, cut: Cut, whole: Mapping[str, int], latents: Tensor, prompt: Conditioning, stored: Stored
) -> int:
    """Operations of a training step; `whole` are those of the network that is not hollowed, by module."""
    if not isinstance(cut, int):  # of blocks in a row, which share tensors, a backward pass is not told apart
        return _flops(network.hollow(cut, [_TIMESTEP]), latents, prompt, stored)[""]
    removed = network.removed(cut)
    not_before = tuple(f"{path}." for path in (*removed, *network.behind(cut)))
    if any(not path.startswith(not_before) for path in named_lora_parameters(network.module)):
        # with a LoRA before the exit, gradients reach all that is behind it, as in the whole
        return whole[""] - _of(removed, whole)
    return _flops(network.hollow(cut, [_TIMESTEP]), latents, prompt, stored)[""]


def _of(paths: Iterable[str], counts: Mapping[str, int]) -> int:
    """Of modules; those of a list, which is never called itself, are its items'."""
    items = {path: [name for name in counts if name.rpartition(".")[0] == path] for path in paths}
    return sum(counts[path] if path in counts else sum(counts[name] for name in items[path]) for path in items)


def _flops(network: Network, latents: Tensor, prompt: Conditioning, stored: Stored) -> dict[str, int]:
    """Of a forward pass and, where gradients are on, the backward pass that follows: {module path: operations},
    the whole under ""."""
    with Alike(), FlopCounterMode(display=False) as counter:
        out = network.predict(latents, [_TIMESTEP], prompt, stored)
        if out.requires_grad:
            out.sum().backward()
    counts = {path.partition(".")[2]: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    return counts | {"": counter.get_total_flops()}
