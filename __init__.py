"""ComfyUI's door to Hollow: hands on the node list and the web folder, nothing else."""

from typing import Any

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint() -> Any:
    """What ComfyUI asks a pack of V3 nodes for."""
    from .nodes import HollowExtension

    return HollowExtension()
