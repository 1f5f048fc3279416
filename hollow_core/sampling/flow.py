"""Pictures from a transformer: Euler steps from noise along what it predicts, as every family's own pipeline takes them."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..models.transformer_model import TransformerModel
from ..nets.conditioning import Conditioning


@torch.no_grad()
def euler(model: TransformerModel, text: dict[str, Any], noise: Tensor, steps: int, guidance: float) -> Tensor:
    """Latents (batch, channels, height, width), in float32, from `noise` of that shape and what `encode_guided` gives
    for as many prompts. `guidance` counts where there are negative prompts: 1 is none.
    """
    scheduler = noise_levels(model, *noise.shape[-2:], steps)
    latents = noise.to(model.network.module.device, torch.float32)
    for timestep in scheduler.timesteps.tolist():
        velocity = _velocity(model, latents, timestep, text["prompts"])
        if text["negatives"]:
            away = _velocity(model, latents, timestep, text["negatives"])
            velocity = model.family.guided(velocity, away, guidance)
        latents = scheduler.step(velocity, torch.tensor(timestep), latents, return_dict=False)[0]
    return latents


def noise_levels(model: TransformerModel, height: int, width: int, steps: int) -> FlowMatchEulerDiscreteScheduler:
    """The model's scheduler, set to so many steps for latents of height × width."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.scheduler.config)
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
    found = torch.empty_like(latents)
    for indices in alike.values():
        seen = Conditioning.batch([prompts[index] for index in indices])
        found[indices] = model.network.predict(latents[indices], [timestep] * len(indices), seen, {})
    return found
