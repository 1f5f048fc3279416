"""The types of Hollow's own wires."""

from collections.abc import Collection
from typing import Any

from comfy_api.v0_0_2 import io

CATEGORY = "Hollow"

HollowUNetType = io.Custom("HOLLOW_UNET")
HollowActivationsType = io.Custom("HOLLOW_ACTIVATIONS")
HollowLoraType = io.Custom("HOLLOW_LORA")
HOLLOW_LORA = HollowLoraType.Input("hollow_lora", tooltip="From Train Hollowed LoRA or Load Hollowed LoRA.")
LoraModel = io.Custom("LORA_MODEL")  # ComfyUI's own: a LoRA as a dict of tensors
LossMap = io.Custom("LOSS_MAP")  # ComfyUI's own: {"loss": […]}


def showing_schema(*, face: Collection[str] = (), **described: Any) -> io.Schema:
    """The schema of a node that shows something by its `ui` and is no output node: where it is cached, hosts of 2026
    show it again if they are asked to. With a `face`, widgets beside those it names are advanced."""
    for given in described["inputs"]:
        if face and given.id not in face and hasattr(given, "default"):
            given.advanced = True  # older hosts do not look at it
    if hasattr(io.Schema, "has_intermediate_output"):
        described["has_intermediate_output"] = True
    return io.Schema(**described)
