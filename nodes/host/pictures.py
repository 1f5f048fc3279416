"""Pictures as ComfyUI's IMAGE, and back."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor


def to_image(picture: Image.Image) -> Tensor:
    """An RGB picture as an IMAGE (1, height, width, 3) in 0…1."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, picture.height, picture.width, 3).float() / 255


def to_mask(mask: Image.Image) -> Tensor:
    """A picture in shades of gray (mode L) as a MASK (1, height, width) in 0…1."""
    return torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).reshape(1, mask.height, mask.width) / 255


def to_picture(image: Tensor) -> Image.Image:
    """The first picture of an IMAGE (batch, height, width, 3)."""
    pixels = (image[0, ..., :3] * 255).round().clamp(0, 255).to("cpu", torch.uint8)
    return Image.fromarray(pixels.numpy())


def to_pictures(images: Sequence[Tensor]) -> list[Image.Image]:
    """IMAGEs (batch, height, width, 3) in 0…1 as RGB pictures."""
    return [to_picture(image) for batch in images for image in batch.split(1)]
