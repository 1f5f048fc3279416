"""Two-Path Model: a MODEL that samples on two paths, for any sampler."""

from typing import Any

from comfy_api.v0_0_2 import io

from .types import CATEGORY, HOLLOW_LORA

MODEL = io.Model.Input("model", tooltip="The model that the LoRA was trained on, or one like it.")
STRENGTH = io.Float.Input(
    "strength", default=1.0, min=-10.0, max=10.0, step=0.01, tooltip="How strongly the LoRA counts; 1 is as trained."
)
REFRESH = io.Int.Input(
    "refresh",
    default=1,
    min=1,
    max=100,
    tooltip="Run the base path every n-th step only and reuse it between. 1 costs about 30 % more than one path, "
    "3 about 6 %; the picture changes a little.",
)


class HollowTwoPathModel(io.ComfyNode):
    """The two-path patch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and what they are for."""
        return io.Schema(
            node_id="HollowTwoPathModel",
            display_name="Two-Path Model",
            category=CATEGORY,
            description="Applies a hollowed LoRA the way it was trained: the base path under the generic prompt up "
            "to the hollow's end, the personal path with the LoRA from there. Works with every sampler.",
            inputs=[
                MODEL,
                HOLLOW_LORA,
                STRENGTH,
                REFRESH,
                io.Boolean.Input(
                    "lora_on_negatives",
                    default=True,
                    tooltip="Whether the negative prompt is seen with the LoRA, as everywhere else in ComfyUI.",
                ),
                io.Conditioning.Input(
                    "generic",
                    optional=True,
                    tooltip="Your prompt without the identifier, from Split Prompt. Not connected, the base path sees "
                    "the same prompt as the personal one.",
                ),
            ],
            outputs=[io.Model.Output("two_path_model", display_name="MODEL")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        hollow_lora: Any,
        strength: float,
        refresh: int,
        lora_on_negatives: bool,
        generic: Any = None,
    ) -> io.NodeOutput:
        """The patched MODEL."""
        from .host.two_path import two_path_model

        patched = two_path_model(
            model, hollow_lora, generic, strength=strength, refresh=refresh, lora_on_negatives=lora_on_negatives
        )
        return io.NodeOutput(patched)
