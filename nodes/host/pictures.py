"""Pictures as ComfyUI's IMAGE."""

import torch
from PIL import Image
from torch import Tensor


def to_image(picture: Image.Image) -> Tensor:
    """An RGB picture as an IMAGE (1, height, width, 3) in 0…1."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, picture.height, picture.width, 3).float() / 255
