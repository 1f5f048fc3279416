"""Layer Weight Analyzer: what is in a LoRA, block by block."""

from typing import Any

from comfy_api.v0_0_2 import io

from .types import CATEGORY, HollowLoraType


class HollowLayerWeightAnalyzer(io.ComfyNode):
    """The paper's Fig. 2 for LoRAs of your own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and what they are for."""
        return io.Schema(
            node_id="HollowLayerWeightAnalyzer",
            display_name="Layer Weight Analyzer",
            category=CATEGORY,
            description="Shows how much a LoRA changes each block of the U-Net, at which rank, what looks wrong, and "
            "how much could be hollowed: of one LoRA, of two to compare, or the mean of many. Size of change is not "
            "influence.",
            inputs=[
                HollowLoraType.Input(
                    "hollow_lora", optional=True, tooltip="From Train Hollowed LoRA or Load Hollowed LoRA."
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model it belongs to: colours then show the change in relation to its weights. Needed "
                    "for models other than SD1.5, SD2.1 and SDXL.",
                ),
                io.String.Input(
                    "files",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="More LoRAs from the loras folder, of any trainer, one name a line; * stands for any "
                    "letters. Two LoRAs are compared, of more you see mean and spread.",
                ),
                io.Float.Input(
                    "share",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="How much of all change the suggested cut may leave out.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="chart"),
                io.String.Output("json", display_name="JSON"),
                io.Int.Output("suggested_cut", display_name="suggested cut"),
                io.String.Output(
                    "block_weights",
                    display_name="block weights",
                    tooltip="For tools that take block weights: 0 for what the suggested cut hollows, 1 for the rest.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, files: str = "", **others: Any) -> list[float]:
        """Read again where a file was written anew."""
        from .host.files import matching_loras

        return [path.stat().st_mtime for path in matching_loras(files or "")]

    @classmethod
    def execute(cls, hollow_lora: Any = None, model: Any = None, files: str = "", share: float = 0.1) -> io.NodeOutput:
        """The chart, its figures, the deepest cut that leaves out no more than `share` of the change, or 0."""
        import json

        from ..hollow_core.analysis.picture import picture
        from .host.analysis import all_figures, analyses_of
        from .host.pictures import to_image

        analyses = analyses_of(hollow_lora, model, files)
        found = all_figures(analyses, share)
        first = found["suggestions"][0]
        return io.NodeOutput(
            to_image(picture(analyses, share)),
            json.dumps(found, indent=1),
            first["cut"] if first else 0,
            first["block_weights"] if first else "",
        )
