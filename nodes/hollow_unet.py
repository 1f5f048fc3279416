"""Hollow U-Net: choose how much of a model leaves memory while training."""

from typing import Any

from comfy_api.v0_0_2 import io

from .types import CATEGORY, HollowUNetType, showing_schema

BASE_BITS = {"as they are": None, "8 bit": 8, "4 bit": 4}


class HollowUNet(io.ComfyNode):
    """A MODEL and a cut, and whether that fits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and what they are for."""
        return showing_schema(
            node_id="HollowUNet",
            display_name="Hollow U-Net",
            category=CATEGORY,
            description="Takes the middle of a U-Net out for training. What it would have done is precomputed once. "
            "Shows what each cut would need, and what fits into the budget.",
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5, SD2.1 or SDXL model. A LoRA loaded before stays in effect."),
                io.Int.Input(
                    "cut",
                    default=3,
                    min=-1,
                    max=11,
                    tooltip="How much to hollow. 3 is the paper's choice for SD: 39 % less U-Net in memory at no loss "
                    "of likeness. Higher saves more memory (4: 57 %, 5: 73 %) and learns less; 0 takes the middle "
                    "block only, the paper's choice for SDXL. -1 takes the lowest that fits into the budget, turning "
                    "on what it needs of gradient checkpointing, 8-bit weights and streaming.",
                ),
                io.Float.Input(
                    "budget",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.1,
                    optional=True,
                    tooltip="Memory in GB that training may take. 0 is what is free on the GPU now, ComfyUI's own "
                    "models not counted, as they leave.",
                ),
                io.Combo.Input(
                    "base_weights",
                    options=list(BASE_BITS),
                    default="as they are",
                    optional=True,
                    tooltip="How the frozen weights are kept while training; your MODEL stays as it is. 8 bit halves "
                    "those of fp16 at hardly any loss, 4 bit quarters them at some. Steps take somewhat longer.",
                ),
                io.Boolean.Input(
                    "streaming",
                    default=False,
                    optional=True,
                    tooltip="Keep the frozen weights in main memory, from where each visits the GPU when it is needed. "
                    "Needs the least memory of all and changes no result, but steps take longer.",
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    optional=True,
                    tooltip="For the plan only: the side of your pictures in pixels. 0 is the model's own.",
                ),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=1024,
                    optional=True,
                    tooltip="For the plan only: that of Train Hollowed LoRA.",
                ),
            ],
            outputs=[HollowUNetType.Output("hollow_unet", display_name="hollow U-Net")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        cut: int,
        budget: float = 0.0,
        base_weights: str = "as they are",
        streaming: bool = False,
        resolution: int = 0,
        rank: int = 16,
    ) -> io.NodeOutput:
        """Refuse here what could not be trained, long before training; the plan as a picture."""
        from comfy_api.v0_0_2 import ui

        from ..hollow_core.nets.unet_layers import check_cut
        from .handles import HollowedModel
        from .host.pictures import to_image
        from .host.plan import AUTO, plan
        from .host.unet import noise_schedule, unet_config

        config = unet_config(model)
        if cut != AUTO:
            check_cut(config, cut)
        noise_schedule(model)
        asked = HollowedModel(model, cut, BASE_BITS[base_weights], streaming)
        planned = plan(asked, budget, resolution, rank, node_id=cls.hidden.unique_id)
        return io.NodeOutput(planned.hollowed, ui=ui.PreviewImage(to_image(planned.picture)))
