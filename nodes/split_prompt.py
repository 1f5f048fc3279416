"""Split Prompt: one text, the two prompts of the method."""

import logging
from typing import Any

from comfy_api.v0_0_2 import io

from .types import CATEGORY


class HollowSplitPrompt(io.ComfyNode):
    """The personal and the generic prompt of a text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and what they are for."""
        return io.Schema(
            node_id="HollowSplitPrompt",
            display_name="Split Prompt",
            category=CATEGORY,
            description="Makes both prompts of Hollow from one text: the personal one as it is, and the generic one "
            "without the identifier, which is all that the base path may see.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model that you train or sample."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="a photo of a sks dog",
                    tooltip="A prompt that names your subject by the identifier and a common word for what it is. "
                    "As a caption in training, say the background too: 'a photo of a sks dog on grass'.",
                ),
                io.String.Input(
                    "identifier",
                    default="sks",
                    tooltip="The rare word that stands for your subject. Use the same in training and sampling. "
                    "Several with commas between: sks, xyz. Empty for a style: both prompts are then the same.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("personal", display_name="personal"),
                io.Conditioning.Output("generic", display_name="generic"),
                io.String.Output("personal_text", display_name="personal text"),
                io.String.Output("generic_text", display_name="generic text"),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, text: str, identifier: str) -> io.NodeOutput:
        """Both prompts, encoded and as text."""
        from ..hollow_core.data.prompts import generic_prompt
        from .host.conditioning import encode, same

        generic = generic_prompt(text, identifier)
        seen, base_sees = encode(clip, text, identifier), encode(clip, generic, identifier)
        if text.split() != generic.split() and same(seen, base_sees):
            logging.warning("Hollow: the text encoder does not read as far as %s in %r.", identifier, text)
        return io.NodeOutput(seen, base_sees, text, generic)
