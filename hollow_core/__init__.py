"""Hollow: personalise Stable Diffusion on a small GPU, by LoRA on a hollowed U-Net."""

__version__ = "0.1.0"
