"""The public families, each as a diffusers folder without weights, and CLIP's tokenizer: what single files lack."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import HollowError
from ...files import read_json

LAYOUTS = ("sd15", "sd21", "sdxl")

TRANSFORMERS = ("flux", "z-image", "qwen-image", "sd35-medium", "krea2", "anima")
"""Layouts without tokenizers: for planning."""

FOLDER = Path(__file__).parent


def layout_config(name: str) -> dict[str, Any]:
    """The U-Net config of a public model family, as diffusers writes it.

    "sd15" is Stable Diffusion 1.x, "sd21" is 2.x at its base size of 512 pixels, "sdxl" is SDXL base.
    """
    if name not in LAYOUTS:
        raise HollowError(f"There is no layout named {name!r}. Choose one of {', '.join(LAYOUTS)}.")
    return read_json(FOLDER / name / "unet" / "config.json")


def transformer_config(name: str) -> dict[str, Any]:
    """The config of the network of one of TRANSFORMERS, as diffusers writes it."""
    return read_json(FOLDER / name / "transformer" / "config.json")


def layout_name(config: Mapping[str, Any]) -> str:
    """The family of a U-Net config: "sdxl" by its size conditioning, "sd15", "sd21" by their text width."""
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    width = config["cross_attention_dim"]
    return {768: "sd15", 1024: "sd21"}.get(width, "other") if isinstance(width, int) else "other"
