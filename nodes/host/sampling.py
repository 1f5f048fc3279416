"""ComfyUI's KSampler."""

from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher

SAMPLERS: list[str] = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS: list[str] = comfy.samplers.KSampler.SCHEDULERS


def sample(
    model: ModelPatcher,
    positive: Any,
    negative: Any,
    latent_image: dict[str, Any],
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    denoise: float,
) -> dict[str, Any]:
    """A LATENT, as the KSampler node gives it: with its progress, previews, masks and Cancel."""
    import nodes as comfy_nodes  # ComfyUI's own, not this pack's

    (latent,) = comfy_nodes.common_ksampler(
        model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise
    )
    return latent
