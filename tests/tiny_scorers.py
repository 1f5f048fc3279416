"""DINO and CLIP of the real classes, with tiny random weights, in folders as the hub has them."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel


def save_tiny_scorers(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """The folders of DINO and CLIP; large weights, so that features differ from picture to picture."""
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dino = ViTModel(ViTConfig(**small, patch_size=112, initializer_range=0.5), add_pooling_layer=False)
        text = {**small, "eos_token_id": 2}  # as OpenAI's config has it: the last token is found by its largest id
        vision = {**small, "patch_size": 112}
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, initializer_factor=10.0)
        clip = CLIPModel(config)
    dino.save_pretrained(folder / "dino")
    clip.save_pretrained(folder / "clip")
    return folder / "dino", folder / "clip"
