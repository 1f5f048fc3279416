"""Save and Load Hollowed LoRA: an ordinary LoRA file in ComfyUI's loras folder."""

from typing import Any

from comfy_api.v0_0_2 import io

from .types import CATEGORY, HollowLoraType, LoraModel


class HollowSaveLoRA(io.ComfyNode):
    """A LoRA to a file that every tool reads."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and what they are for."""
        return io.Schema(
            node_id="HollowSaveLoRA",
            display_name="Save Hollowed LoRA",
            category=CATEGORY,
            description="Writes the LoRA into ComfyUI's loras folder, for ComfyUI, A1111, Forge, InvokeAI and "
            "diffusers, and reads it back to be sure.",
            is_output_node=True,
            inputs=[
                HollowLoraType.Input("hollow_lora", tooltip="From Train Hollowed LoRA."),
                io.String.Input(
                    "name",
                    default="hollow/my-subject",
                    tooltip="File in the loras folder, without .safetensors; a / makes a folder. Overwritten if there.",
                ),
            ],
            outputs=[io.String.Output("path", display_name="path")],
        )

    @classmethod
    def execute(cls, hollow_lora: Any, name: str) -> io.NodeOutput:
        """The path of the written file."""
        from ..hollow_core.lora_file import write
        from .host.files import lora_path

        path = lora_path(name)
        titled = {"ss_output_name": path.stem, "modelspec.title": path.stem}
        write(path, hollow_lora.state, hollow_lora.metadata | titled)
        return io.NodeOutput(str(path), ui={"text": (f"{path}, {path.stat().st_size / 2**20:.1f} MB",)})


class HollowLoadLoRA(io.ComfyNode):
    """A LoRA of Hollow's from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and what they are for."""
        from .host.files import known_loras

        return io.Schema(
            node_id="HollowLoadLoRA",
            display_name="Load Hollowed LoRA",
            category=CATEGORY,
            description="Reads a LoRA that Hollow trained, with what two-path sampling needs to know of it.",
            inputs=[io.Combo.Input("name", options=known_loras(), tooltip="A file in ComfyUI's loras folder.")],
            outputs=[
                HollowLoraType.Output("hollow_lora", display_name="hollow LoRA"),
                LoraModel.Output("lora_model", display_name="LoRA", tooltip="For ComfyUI's own LoRA nodes."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> float:
        """Read again where the file was written anew."""
        from .host.files import known_lora

        return known_lora(name).stat().st_mtime

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        """The LoRA in both spellings of the graph."""
        from ..hollow_core.errors import HollowError
        from ..hollow_core.files import read_safetensors
        from ..hollow_core.lora_file import recipe_of
        from .handles import HollowLora
        from .host.files import known_lora

        path = known_lora(name)
        state, metadata = read_safetensors(path)
        recipe = recipe_of(metadata)
        if recipe is None:
            raise HollowError(f"{path.name} was not trained by Hollow. Use it with ComfyUI's own LoRA loader.")
        return io.NodeOutput(HollowLora(state, recipe, metadata), state)
