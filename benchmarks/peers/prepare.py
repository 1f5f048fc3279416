"""What all of them train on: a base model of random weights, and a picture."""

import argparse

import torch
from PIL import Image

from benchmarks.road import random_model
from hollow_core.files import write_safetensors
from hollow_core.models.base_model import outline

PROMPT = "a photo of a sks dog"
RECORDS = 4  # that Hollow precomputes; a step's costs are those of any number
TEXT_ENCODER = "comfyui/text_encoder_{}.safetensors"


def prepare(options: argparse.Namespace) -> None:
    """The base model, a diffusers folder in fp16 as models are published, and the picture."""
    options.model, options.images = options.out / f"model-{options.layout}", options.out / "images"
    if not (options.model / "model_index.json").exists():  # the last of its files
        model = random_model(outline(options.layout, torch.float16))
        for number, encoder in enumerate(model.text_encoders):
            write_safetensors(options.model / TEXT_ENCODER.format(number), clip_names(encoder.state_dict()))
        model.pipeline().save_pretrained(options.model)
    options.images.mkdir(exist_ok=True)
    Image.effect_noise((options.resolution,) * 2, 64).convert("RGB").save(options.images / "picture.png")


def clip_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As older transformers name a text encoder's weights, and ComfyUI expects them."""
    names = {key: key.removeprefix("text_model.") for key in state}
    return {name if "projection" in name else f"text_model.{name}": state[key] for key, name in names.items()}
