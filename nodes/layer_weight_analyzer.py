"""Layer Weight Analyzer: what a LoRA changed, block by block."""

from typing import Any

from comfy_api.v0_0_2 import io

from .types import CATEGORY, HOLLOW_LORA


class HollowLayerWeightAnalyzer(io.ComfyNode):
    """The paper's Fig. 2 for a LoRA of your own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and what they are for."""
        return io.Schema(
            node_id="HollowLayerWeightAnalyzer",
            display_name="Layer Weight Analyzer",
            category=CATEGORY,
            description="Shows how much a LoRA changes each block of the U-Net, and suggests how much could be "
            "hollowed. Size of change is not influence.",
            inputs=[
                HOLLOW_LORA,
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model it belongs to. Needed for models other than SD1.5, SD2.1 and SDXL.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="chart"),
                io.String.Output("json", display_name="JSON"),
                io.Int.Output("suggested_cut", display_name="suggested cut"),
            ],
        )

    @classmethod
    def execute(cls, hollow_lora: Any, model: Any = None) -> io.NodeOutput:
        """The chart, its figures, and the largest cut that would leave out at most a tenth of all change."""
        import json

        from ..hollow_core.blocks import layout_config
        from ..hollow_core.lora_file import layout_of
        from ..hollow_core.weight_change import chart, suggested_cut, weight_changes
        from .host.pictures import to_image
        from .host.unet import unet_config

        config = layout_config(layout_of(hollow_lora.metadata)) if model is None else unet_config(model)
        changes = weight_changes(hollow_lora.state, config)
        cut = suggested_cut(changes, config)
        figures = {"suggested_cut": cut, "layers": [change._asdict() for change in changes]}
        return io.NodeOutput(to_image(chart(changes)), json.dumps(figures, indent=1), cut)
