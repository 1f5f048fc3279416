"""Two-Path Sampler: the KSampler on two paths."""

from typing import Any

from comfy_api.v0_0_2 import io

from .two_path_model import MODEL, REFRESH, STRENGTH
from .types import CATEGORY, HOLLOW_LORA


class HollowTwoPathSampler(io.ComfyNode):
    """Two-Path Model and a KSampler in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and what they are for."""
        from .host.sampling import SAMPLERS, SCHEDULERS

        return io.Schema(
            node_id="HollowTwoPathSampler",
            display_name="Two-Path Sampler",
            category=CATEGORY,
            description="Draws with a hollowed LoRA the way it was trained, on two paths. A KSampler in all else.",
            inputs=[
                MODEL,
                HOLLOW_LORA,
                io.Conditioning.Input("positive", tooltip="Your prompt with the identifier: 'a sks dog on the moon'."),
                io.Conditioning.Input(
                    "generic", tooltip="The same without it: 'a dog on the moon' (Split Prompt); of a style the same."
                ),
                io.Conditioning.Input("negative", tooltip="What you do not want to see."),
                io.Latent.Input("latent_image", tooltip="An empty latent, or a picture to start from."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise.",
                ),
                io.Int.Input("steps", default=30, min=1, max=10_000, tooltip="Denoising steps."),
                io.Float.Input(
                    "cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Strength of the prompt."
                ),
                io.Combo.Input("sampler_name", options=SAMPLERS, tooltip="The sampling algorithm."),
                io.Combo.Input("scheduler", options=SCHEDULERS, tooltip="How the noise goes down."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 keeps that much less of the noise, and more of the picture you start from.",
                ),
                STRENGTH,
                REFRESH,
            ],
            outputs=[io.Latent.Output("latent", display_name="LATENT")],
        )

    @classmethod
    def execute(
        cls, model: Any, hollow_lora: Any, generic: Any, strength: float, refresh: int, **settings: Any
    ) -> io.NodeOutput:
        """The denoised latent."""
        from .host.sampling import sample
        from .host.two_path import two_path_model

        patched = two_path_model(model, hollow_lora, generic, strength=strength, refresh=refresh)
        return io.NodeOutput(sample(patched, **settings))
