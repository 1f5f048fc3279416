"""Pictures to latents and back, by any of the VAEs that base models have.

AutoencoderKL and AutoencoderTiny take pictures; those of Qwen-Image and Wan take films, of which a picture is one
frame, and have a mean and a deviation for each channel.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from torch import Tensor


def to_latents(vae: Any, pixels: Tensor) -> Tensor:
    """Scaled latents (1, channels, height, width) of a picture (1, 3, height, width) from -1 to 1: the posterior's
    mean."""
    if _takes_films(vae.config):
        mean = retrieve_latents(vae.encode(pixels.unsqueeze(2)), sample_mode="argmax").squeeze(2)
        middle, spread = _statistics(vae, mean)
        return (mean - middle) / spread
    mean = retrieve_latents(vae.encode(pixels), sample_mode="argmax")
    scaled: Tensor = (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    return scaled


def to_pixels(vae: Any, latents: Tensor) -> Tensor:
    """The inverse: (1, 3, height, width)."""
    if _takes_films(vae.config):
        middle, spread = _statistics(vae, latents)
        film: Tensor = vae.decode((latents * spread + middle).unsqueeze(2)).sample
        return film.squeeze(2)
    pixels: Tensor = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample
    return pixels


def tile(vae: Any, side: int, latent_side: int) -> None:
    """Let it take pictures in overlapping tiles of `side` pixels, `latent_side` latents. An AutoencoderTiny needs
    little, and stays as it is."""
    if isinstance(vae, AutoencoderKL):
        vae.enable_tiling()
        # diffusers' own tiles are as large as the native pictures, which thus would never be tiled
        vae.tile_sample_min_size, vae.tile_latent_min_size = side, latent_side
    elif _takes_films(vae.config):
        stride = side - side // 4
        vae.enable_tiling(side, side, stride, stride)


def pixels_per_latent(config: Mapping[str, Any]) -> int:
    """To a side, as the VAE's config tells."""
    if _takes_films(config):
        return 2 ** len(config["temperal_downsample"])
    levels = config.get("block_out_channels") or config["decoder_block_out_channels"]
    return 2 ** (len(levels) - 1)


def _takes_films(config: Mapping[str, Any]) -> bool:
    return "temperal_downsample" in config  # diffusers' spelling


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel."""
    mean, deviation = (
        torch.tensor(numbers, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, deviation
