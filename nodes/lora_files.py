"""Save, Load and Convert: LoRA files in ComfyUI's loras folder."""

from typing import Any

from comfy_api.v0_0_2 import io

from .types import CATEGORY, HollowLoraType, LoraModel

DIALECTS = ("kohya", "diffusers", "peft", "comfy")
NAME_TIP = "File in the loras folder, without .safetensors; a / makes a folder. Overwritten if there."
DIALECT = io.Combo.Input(
    "dialect",
    options=list(DIALECTS),
    default=DIALECTS[0],
    optional=True,
    tooltip="Whose spelling: kohya's suits ComfyUI, A1111, Forge, InvokeAI and diffusers alike; peft makes a folder.",
)
ZERO_PAD = io.Boolean.Input(
    "zero_pad",
    default=False,
    optional=True,
    tooltip="Write zeros for the blocks that have no LoRA, for nodes that count blocks in order (block weights).",
)
MODEL = io.Model.Input(
    "model",
    optional=True,
    tooltip="The model it belongs to. Needed for models other than SD1.5, SD2.1 and SDXL.",
)


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
            "diffusers, reads it back to be sure, and tells how large its largest change is.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                HollowLoraType.Input("hollow_lora", tooltip="From Train Hollowed LoRA."),
                io.String.Input("name", default="hollow/my-subject", tooltip=NAME_TIP),
                DIALECT,
                ZERO_PAD,
                io.Image.Input(
                    "thumbnail",
                    optional=True,
                    tooltip="A picture that tools which list LoRA files will show, kept small inside the file.",
                ),
                MODEL,
            ],
            outputs=[io.String.Output("path", display_name="path")],
        )

    @classmethod
    def execute(
        cls,
        hollow_lora: Any,
        name: str,
        dialect: str = DIALECTS[0],
        zero_pad: bool = False,
        thumbnail: Any = None,
        model: Any = None,
    ) -> io.NodeOutput:
        """The path of the written file."""
        from .host.lora_files import save

        path, told = save(hollow_lora, name, dialect, zero_pad, thumbnail, model, node_id=cls.hidden.unique_id)
        return io.NodeOutput(str(path), ui={"text": (told,)})


class HollowConvertLoRA(io.ComfyNode):
    """A LoRA file in another tool's spelling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and what they are for."""
        from .host.files import known_loras

        return io.Schema(
            node_id="HollowConvertLoRA",
            display_name="Convert LoRA",
            category=CATEGORY,
            description="Writes a LoRA or DoRA of SD1.5, SD2.1 or SDXL, from whatever trainer, as another tool wants "
            "it, and reads it back to be sure.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input("lora", options=known_loras(), tooltip="A file in ComfyUI's loras folder."),
                io.String.Input("name", default="hollow/converted", tooltip=NAME_TIP),
                DIALECT,
                ZERO_PAD,
                MODEL,
            ],
            outputs=[io.String.Output("path", display_name="path")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str, **rest: Any) -> float:
        """Converted again where the file was written anew."""
        from .host.files import known_lora

        return known_lora(lora).stat().st_mtime

    @classmethod
    def execute(
        cls, lora: str, name: str, dialect: str = DIALECTS[0], zero_pad: bool = False, model: Any = None
    ) -> io.NodeOutput:
        """The path of the written file."""
        from .host.lora_files import convert

        path, told = convert(lora, name, dialect, zero_pad, model, node_id=cls.hidden.unique_id)
        return io.NodeOutput(str(path), ui={"text": (told,)})


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
        from .host.lora_files import load

        lora = load(name)
        return io.NodeOutput(lora, lora.state)
