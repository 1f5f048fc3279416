"""Hollow Demo Model: the embedded model, to try everything without a download."""

from comfy_api.v0_0_2 import io

from .types import CATEGORY


class HollowDemoModel(io.ComfyNode):
    """MODEL, CLIP and VAE of the embedded model, and five pictures of a subject it has never seen."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and what they are for."""
        return io.Schema(
            node_id="HollowDemoModel",
            display_name="Hollow Demo Model",
            category=CATEGORY,
            description="A small Stable Diffusion that comes with Hollow and draws 64x64 pictures, to try a graph "
            "without a download. Swap it for Load Checkpoint when the graph does what you want. Ask Empty Latent "
            "Image for 128x128: ComfyUI takes eight pixels a latent, this model has four.",
            inputs=[],
            outputs=[
                io.Model.Output("model", display_name="MODEL"),
                io.Clip.Output("clip", display_name="CLIP"),
                io.Vae.Output("vae", display_name="VAE"),
                io.Image.Output(
                    "images",
                    display_name="images",
                    is_output_list=True,
                    tooltip="Five pictures of a subject that the model has never seen.",
                ),
                io.String.Output(
                    "captions", display_name="captions", is_output_list=True, tooltip="One for each picture."
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Load it."""
        from .host.demo import demo_images, demo_model

        images, captions = demo_images()
        return io.NodeOutput(*demo_model(), images, captions)
