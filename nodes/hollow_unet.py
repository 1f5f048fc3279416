"""Hollow U-Net: choose how much of a model leaves memory while training."""

from typing import Any

from comfy_api.v0_0_2 import io

from .types import CATEGORY, HollowUNetType


class HollowUNet(io.ComfyNode):
    """A MODEL and a cut."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and what they are for."""
        return io.Schema(
            node_id="HollowUNet",
            display_name="Hollow U-Net",
            category=CATEGORY,
            description="Takes the middle of a U-Net out for training. What it would have done is precomputed once.",
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5, SD2.1 or SDXL model. A LoRA loaded before stays in effect."),
                io.Int.Input(
                    "cut",
                    default=3,
                    min=0,
                    max=11,
                    tooltip="How much to hollow. 3 is the paper's choice for SD: 39 % less U-Net in memory at no loss "
                    "of likeness. Higher saves more memory (4: 57 %, 5: 73 %) and learns less; 0 takes the middle "
                    "block only, the paper's choice for SDXL.",
                ),
            ],
            outputs=[HollowUNetType.Output("hollow_unet", display_name="hollow U-Net")],
        )

    @classmethod
    def execute(cls, model: Any, cut: int) -> io.NodeOutput:
        """Refuse here what could not be trained, long before training."""
        from ..hollow_core.blocks import check_cut
        from .handles import HollowedModel
        from .host.unet import noise_schedule, unet_config

        check_cut(unet_config(model), cut)
        noise_schedule(model)
        return io.NodeOutput(HollowedModel(model, cut))
