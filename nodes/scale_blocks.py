"""Scale Blocks: a LoRA, stronger or weaker block by block."""

from typing import Any

from comfy_api.v0_0_2 import io

from .types import CATEGORY, HOLLOW_LORA, HollowLoraType, LoraModel


class HollowScaleBlocks(io.ComfyNode):
    """Block weights that are kept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and what they are for."""
        return io.Schema(
            node_id="HollowScaleBlocks",
            display_name="Scale Blocks",
            category=CATEGORY,
            description="Multiplies what a LoRA changes, block by block. Save Hollowed LoRA keeps it.",
            inputs=[
                HOLLOW_LORA,
                io.String.Input(
                    "blocks",
                    default="MID=0.5",
                    tooltip="IN08=0.5, 3-2=0, up_blocks.3=2, with commas between; or a string of block weights, "
                    "1,0,0.5,… with 17 or 26 numbers for SD, 12 or 20 for SDXL.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model it belongs to. Needed for models other than SD1.5, SD2.1 and SDXL.",
                ),
            ],
            outputs=[
                HollowLoraType.Output("scaled", display_name="hollow LoRA"),
                LoraModel.Output("lora_model", display_name="LoRA", tooltip="For ComfyUI's own LoRA nodes."),
            ],
        )

    @classmethod
    def execute(cls, hollow_lora: Any, blocks: str, model: Any = None) -> io.NodeOutput:
        """The scaled LoRA in both spellings of the graph."""
        from .host.analysis import scaled

        lora = scaled(hollow_lora, blocks, model)
        return io.NodeOutput(lora, lora.state)
