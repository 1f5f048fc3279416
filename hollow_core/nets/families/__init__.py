"""The families of transformers that Hollow knows. One more is a file here, and a line below."""

from collections.abc import Mapping
from typing import Any

from ...errors import HollowError
from .anima import ANIMA
from .family import Family
from .flux import FLUX
from .krea2 import KREA2
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .z_image import Z_IMAGE

FAMILIES: dict[str, Family] = {family.network: family for family in (FLUX, Z_IMAGE, QWEN_IMAGE, SD3, KREA2, ANIMA)}
"""By the class of the network."""

TITLES = ", ".join(family.title for family in FAMILIES.values())
"""All of them, in words."""


def family_of(network: str) -> Family:
    """The family whose network is diffusers' class of this name. Raises HollowError for one that is not known."""
    if network not in FAMILIES:
        raise HollowError(f"Hollow knows no transformer of the kind {network}. It takes {TITLES}.")
    return FAMILIES[network]


def family_in(config: Mapping[str, Any]) -> Family | None:
    """That of a network's config, as diffusers writes it; None for a U-Net's."""
    return FAMILIES.get(config.get("_class_name", ""))
