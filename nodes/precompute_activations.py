"""Precompute Activations: run the base once and keep what training needs of it."""

from typing import Any

from comfy_api.v0_0_2 import io

from .types import CATEGORY, HollowActivationsType, HollowUNetType, showing_schema

STORAGE = ("float16", "bfloat16", "float32")


class HollowPrecompute(io.ComfyNode):
    """Stage 1 of Hollowed Net."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and what they are for."""
        return showing_schema(
            node_id="HollowPrecompute",
            display_name="Precompute Activations",
            category=CATEGORY,
            description="Runs the frozen U-Net once for every training sample and stores what its middle delivers, "
            "in output/hollow. Cancel keeps what is done; the same inputs again cost nothing.",
            is_input_list=True,  # pictures and captions come as a batch or as lists
            hidden=[io.Hidden.unique_id],
            face=("samples", "name"),
            inputs=[
                HollowUNetType.Input("hollow_unet", tooltip="From Hollow U-Net."),
                io.Latent.Input(
                    "latents",
                    tooltip="Four or five pictures of your subject through VAE Encode: one batch, or a list where "
                    "they differ in size. Crop them before, nothing is squashed here. With masks of Set Latent Noise "
                    "Mask, what is black is not learned.",
                ),
                io.Conditioning.Input(
                    "personal",
                    tooltip="The prompt with the identifier, 'a photo of a sks dog': one for all pictures, or a list "
                    "with one for each.",
                ),
                io.Conditioning.Input(
                    "generic",
                    tooltip="The same without the identifier, 'a photo of a dog'. Split Prompt makes both. Of a "
                    "style, which has no identifier, it is the same as the personal one.",
                ),
                io.Int.Input(
                    "samples",
                    default=200,
                    min=1,
                    max=100_000,
                    tooltip="Records to store, 0.6 MB each for SD at 512 pixels, cut 3. 200 do nearly as well as 1000.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,  # left out, the front end would draw a new one, and precompute anew
                    tooltip="Of the noise in the records.",
                ),
                io.Combo.Input(
                    "storage",
                    options=list(STORAGE),
                    default="float16",
                    tooltip="How records are kept. bfloat16 where float16 overflows, which you would be told.",
                ),
                io.String.Input(
                    "name",
                    default="my-subject",
                    tooltip="Folder in output/hollow. Other inputs get another folder inside it.",
                ),
                io.Latent.Input(
                    "class_latents",
                    optional=True,
                    tooltip="Pictures of any such thing, straight from a KSampler with the generic prompts: they keep "
                    "the model from forgetting what a dog is. The paper uses about 1000, some tens help already.",
                ),
                io.Conditioning.Input(
                    "class_prompt",
                    optional=True,
                    tooltip="The prompts that made the class pictures, a batch each in turn; not connected, the "
                    "generic ones count.",
                ),
                io.Latent.Input(
                    "low_latents",
                    optional=True,
                    tooltip="For the strategy selective: the same pictures in the same order, scaled to half size "
                    "before VAE Encode.",
                ),
                io.Latent.Input(
                    "low_class_latents",
                    optional=True,
                    tooltip="For the strategy selective: the class pictures likewise, if there are any.",
                ),
                io.Int.Input(
                    "together",
                    default=1,
                    min=1,
                    max=8,
                    optional=True,
                    tooltip="How many records of one size pass the U-Net at once: faster, for the memory of so many. "
                    "The plan of Hollow U-Net counts one.",
                ),
                io.Int.Input(
                    "hold_out",
                    default=0,
                    min=0,
                    max=100_000,
                    optional=True,
                    tooltip="5 holds out every fifth picture: it is not learned, and training shows its loss, which "
                    "rises where the others are learned by heart. 0 holds out none.",
                ),
            ],
            outputs=[HollowActivationsType.Output("activations", display_name="activations")],
        )

    @classmethod
    def execute(
        cls,
        hollow_unet: list[Any],
        latents: list[dict[str, Any]],
        personal: list[Any],
        generic: list[Any],
        samples: list[int],
        seed: list[int],
        storage: list[str],
        name: list[str],
        class_latents: list[dict[str, Any]] | None = None,
        class_prompt: list[Any] | None = None,
        low_latents: list[dict[str, Any]] | None = None,
        low_class_latents: list[dict[str, Any]] | None = None,
        together: list[int] | None = None,
        hold_out: list[int] | None = None,
    ) -> io.NodeOutput:
        """A handle on the finished store, and what of it was there."""
        from .host.precompute import precompute

        activations, told = precompute(
            hollow_unet[0],
            latents,
            personal,
            generic,
            class_latents or [],
            class_prompt or generic,
            low_latents or [],
            low_class_latents or [],
            samples=samples[0],
            seed=seed[0],
            storage=storage[0],
            name=name[0],
            together=together[0] if together else 1,
            hold_out=hold_out[0] if hold_out else 0,
            node_id=cls.hidden.unique_id,
        )
        return io.NodeOutput(activations, ui={"text": (told,)})
