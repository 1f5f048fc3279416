"""Pictures from a transformer: Euler steps from noise along what it predicts, as in every family's own pipeline."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..models.transformer_model import TransformerModel
from ..nets.conditioning import Conditioning
from ..progress import Stop, unless_stopped


@torch.no_grad()
def euler(
    model: TransformerModel,
    text: dict[str, Any],
    noise: Tensor,
    steps: int,
    guidance: float,
    stop: Stop | None = None,
) -> Tensor:
    """Latents (batch, channels, height, width), in float32, from `noise` of that shape and what `encode_guided` gives
    for as many prompts. `guidance` counts where there are negative prompts: 1 is none. `stop` is asked before each
    step. Raises Stopped.
    """
    height, width = noise.shape[-2:]
    scheduler, latents = noise_levels(model, height, width, steps), noise.float()
    for timestep in unless_stopped(scheduler.timesteps, stop):
        velocity = _velocity(model, latents, float(timestep), text["prompts"])
        if text["negatives"]:
            away = _velocity(model, latents, float(timestep), text["negatives"])
            velocity = model.family.guided(velocity, away, guidance)
        latents = scheduler.step(velocity, timestep, latents.to(velocity.device), return_dict=False)[0]
    return latents


def noise_levels(model: TransformerModel, height: int, width: int, steps: int) -> FlowMatchEulerDiscreteScheduler:
    """The model's scheduler, set to so many steps for latents of height × width."""
    alone: dict[str, Any] = {"shift_terminal": None} if steps == 1 else {}  # there is nothing to stretch
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.scheduler.config, **alone)
    even = None if model.family.own_steps else np.linspace(1.0, 1 / steps, steps)
    mu = model.mu(height, width) if scheduler.config.use_dynamic_shifting else None
    scheduler.set_timesteps(steps, sigmas=even, mu=mu)
    scheduler.set_begin_index(0)
    return scheduler


def _velocity(model: TransformerModel, latents: Tensor, timestep: float, prompts: Sequence[Conditioning]) -> Tensor:
    """ε − x₀ as the network predicts it, for prompts of as many tokens at once."""
    alike = defaultdict(list)
    for index, prompt in enumerate(prompts):
        alike[prompt.encoder_hidden_states.shape].append(index)
    found: dict[int, Tensor] = {}
    for indices in alike.values():
        seen = Conditioning.batch([prompts[index] for index in indices])
        predicted = model.network.predict(latents[indices], [timestep] * len(indices), seen, {})
        found |= zip(indices, predicted.split(1), strict=True)
    return torch.cat([found[index] for index in range(len(prompts))])
