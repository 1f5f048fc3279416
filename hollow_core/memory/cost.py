"""What each cut costs: parameters, bytes and operations, counted on tensors that hold no data."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..lora.layers import add_lora
from ..nets.conditioning import Conditioning
from ..nets.unet import hollow
from ..nets.unet_layers import Config, Layer, exit_shape, hollowed_layers, layers, max_cut, removed_fraction

PAPER_RANK = 128
"""The rank at which a training step is counted: that of the paper's main experiments."""

_TOKENS = 77  # the length of CLIP's prompts
_TIMESTEP = 0  # any


def cuts_table(config: Config) -> list[dict[str, Any]]:
    """One JSON-ready row for every cut of a U-Net, at batch 1 and the size of image that the config names.

    - `k`: the cut
    - `blocks`: the hollowed layers by the paper's names
    - `removed_percent`: of the parameters, the time-embedding MLP among them
    - `parameters`: how many are kept
    - `exit_shape`: [channels, height, width] of the exit activation
    - `record_bytes`: its size in fp16
    - `flops`: floating-point operations, a multiply-add counted as two: `full` of the whole U-Net forward,
      `precompute` of the base path up to the exit, `hollowed_forward` of the hollowed U-Net without LoRA,
      `training_step` forward and backward with a LoRA of rank 128 on the attention. (The paper's table 3 takes
      twice the forward for the backward; here frozen weights need no gradients. Where a cut leaves no
      attention to train, the step is the forward alone.)

    Raises HollowError for a U-Net that cannot be cut.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        sample, prompt = inputs(config)
    total = unet.num_parameters()
    removed = [removed_fraction(unet, cut) for cut in range(max_cut(config) + 1)]
    with torch.no_grad():
        counts = _flops(unet, sample, prompt)
    full = counts[""]
    add_lora(unet, PAPER_RANK, generator=torch.Generator())
    table = []
    for cut, fraction in enumerate(removed):
        hollowed_here = hollowed_layers(config, cut)
        behind = [layer for layer in layers(config) if layer.side == "up" and layer not in hollowed_here]
        shape = exit_shape(config, cut, *sample.shape[-2:])
        activation = torch.empty(1, *shape, device="meta")
        hollowed = hollow(unet, cut, timesteps=[_TIMESTEP])
        row = {
            "k": cut,
            "blocks": [layer.name for layer in hollowed_here],
            "removed_percent": round(100 * fraction, 2),
            "parameters": total - round(fraction * total),
            "exit_shape": list(shape),
            "record_bytes": 2 * activation.numel(),
            "flops": {
                "full": full,
                "precompute": full - _of(behind, counts) - counts["conv_out"],
                "hollowed_forward": full - _of(hollowed_here, counts) - counts["time_embedding"],
                "training_step": _flops(hollowed, sample, prompt, exit_activation=activation)[""],
            },
        }
        table.append(row)
    return table


def _of(some: list[Layer], counts: Mapping[str, int]) -> int:
    return sum(counts[path] for layer in some for path in layer.modules)


def inputs(config: Config) -> tuple[Tensor, Conditioning]:
    """Latents (1, channels, height, width) and a prompt, of the sizes that `config` names; content undefined."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    sample = torch.empty(1, config["in_channels"], height, width)
    prompt = torch.empty(1, _TOKENS, config["cross_attention_dim"])
    if config.get("addition_embed_type") is None:
        return sample, Conditioning(prompt)
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return sample, Conditioning(prompt, torch.empty(1, pooled), torch.empty(1, 6))


def _flops(unet: UNet2DConditionModel, sample: Tensor, prompt: Conditioning, **kwargs: Tensor) -> dict[str, int]:
    """Of a forward pass and, where gradients are on, the backward pass that follows: {module path: operations},
    the whole under ""."""
    with FlopCounterMode(display=False) as counter:
        out = unet(sample, _TIMESTEP, **prompt.kwargs(), **kwargs).sample
        if out.requires_grad:
            out.sum().backward()
    counts = {path.partition(".")[2]: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    return counts | {"": counter.get_total_flops()}
