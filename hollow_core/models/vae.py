"""Pictures to latents and back, by any of the VAEs that base models have.

AutoencoderKL and AutoencoderTiny take pictures; those of Qwen-Image and Wan take films, of which a picture is one
frame.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from torch import Tensor

from ..errors import HollowError


def to_latents(vae: Any, pixels: Tensor) -> Tensor:
    """Scaled latents (1, channels, height, width) of a picture (1, 3, height, width) from -1 to 1: the posterior's
    mean."""
    films = _takes_films(vae.config)
    mean = retrieve_latents(vae.encode(pixels.unsqueeze(2) if films else pixels), sample_mode="argmax")
    mean = mean.squeeze(2) if films else mean
    middle, spread, scale = _statistics(vae, mean)
    return (mean - middle) * scale / spread


def to_pixels(vae: Any, latents: Tensor) -> Tensor:
    """The inverse: (1, 3, height, width)."""
    middle, spread, scale = _statistics(vae, latents)
    films, raw = _takes_films(vae.config), latents * spread / scale + middle
    pixels: Tensor = vae.decode(raw.unsqueeze(2) if films else raw).sample
    return pixels.squeeze(2) if films else pixels


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


def latent_channels(config: Mapping[str, Any]) -> int:
    """As the VAE's config tells."""
    return int(config["z_dim" if _takes_films(config) else "latent_channels"])


def _takes_films(config: Mapping[str, Any]) -> bool:
    return "temperal_downsample" in config  # diffusers' spelling


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float, float]:
    """How latents are scaled: their mean and deviation, of each channel where the config has both, and a factor. Raises
    HollowError for numbers that do not fit them."""
    config, channels = vae.config, like.shape[1]
    scale = config.get("scaling_factor") or 1.0
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None or deviation is None:
        return config.get("shift_factor") or 0.0, 1.0, scale
    if not len(mean) == len(deviation) == channels or 0 in deviation:
        raise HollowError(
            f"The VAE's latents_mean {mean} and latents_std {deviation} are not for its {channels} channels. Get its "
            "config again."
        )
    middle, spread = (
        torch.tensor(each, dtype=like.dtype, device=like.device).view(1, -1, 1, 1) for each in (mean, deviation)
    )
    return middle, spread, scale
