"""Load Pictures: a folder of pictures with their captions and masks, cropped as they will be learned."""

from typing import Any

from comfy_api.v0_0_2 import io

from .types import CATEGORY


class HollowLoadPictures(io.ComfyNode):
    """Pictures and captions of a subject, and a contact sheet of what the crop leaves of them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and what they are for."""
        from .host.load_pictures import picture_folders

        return io.Schema(
            node_id="HollowLoadPictures",
            display_name="Load Pictures",
            category=CATEGORY,
            description="Reads a folder of ComfyUI's input folder: pictures of your subject, and the captions that "
            "lie beside them as text files, and masks. Shows what crop and mask leave of each.",
            is_output_node=True,  # runs by itself, to look at the sheet; and hosts send a cached one's sheet again
            is_input_list=True,  # pictures come as a batch, or as a list where they differ in size
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=picture_folders(),
                    tooltip="A folder in ComfyUI's input folder. Pictures in folders inside it do not count: those "
                    "are choices of their own.",
                ),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=8,
                    max=4096,
                    step=8,
                    tooltip="Pixels a side: 512 for SD, 1024 for SDXL.",
                ),
                io.Boolean.Input(
                    "square",
                    default=True,
                    tooltip="On: the square in the middle of each. Off: each keeps about its shape, at the size in "
                    "steps of 64 pixels, and with about the area of resolution × resolution, that cuts off least.",
                ),
                io.String.Input(
                    "caption",
                    multiline=True,
                    default="a photo of a sks dog",
                    tooltip="For pictures that have no text file of their own: rex.txt, rex.caption or rex.jpg.txt is "
                    "the caption of rex.jpg, or metadata.jsonl has it.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures of another node, a batch or a list, instead of the folder's.",
                ),
                io.Boolean.Input(
                    "alpha_mask",
                    default=False,
                    optional=True,
                    tooltip="What is transparent in a picture is not to be learned, unless a mask says otherwise: "
                    "rex-mask.png is the mask of rex.jpg.",
                ),
            ],
            outputs=[
                io.Image.Output("pictures", display_name="images", is_output_list=True, tooltip="For VAE Encode."),
                io.String.Output(
                    "captions",
                    display_name="captions",
                    is_output_list=True,
                    tooltip="For Split Prompt: one for each picture, or one for all if none has a text file.",
                ),
                io.Mask.Output(
                    "masks",
                    display_name="masks",
                    is_output_list=True,
                    tooltip="For Set Latent Noise Mask, between VAE Encode and Precompute Activations: white is "
                    "learned. One for each picture, white all over where it has none.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: list[str | None], images: Any = None) -> bool | str:
        """Refuses a folder that is gone in words of ours; what comes by a wire is known when it runs."""
        from ..hollow_core.errors import HollowError
        from .host.load_pictures import state_of

        if images is None and folder[0] is not None:
            try:
                state_of(folder[0])
            except HollowError as error:
                return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: list[str | None], images: Any = None, **rest: Any) -> Any:
        """Read again where a picture, a text or a mask of the folder was added, removed or changed."""
        from .host.load_pictures import state_of

        return state_of(folder[0]) if images is None and folder[0] is not None else None

    @classmethod
    def execute(
        cls,
        folder: list[str],
        resolution: list[int],
        square: list[bool],
        caption: list[str],
        images: list[Any] | None = None,
        alpha_mask: list[bool] | None = None,
    ) -> io.NodeOutput:
        """Pictures, captions and masks as lists, and the sheet."""
        from comfy_api.v0_0_2 import ui

        from .host.load_pictures import load

        transparent = alpha_mask is not None and alpha_mask[0]
        loaded = load(folder[0], images or (), resolution[0], square[0], caption[0], transparent)
        return io.NodeOutput(loaded.images, loaded.captions, loaded.masks, ui=ui.PreviewImage(loaded.sheet))
