"""Pictures from a base model with a LoRA: on two paths, as an ordinary LoRA, or without it."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import singledispatch
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..data.images import check_resolution
from ..data.prompts import generic_prompt
from ..errors import HollowError
from ..lora.file import LoraFile
from ..lora.layers import load_lora_state, remove_lora, set_strength
from ..lora.metadata import Recipe
from ..models.base_model import BaseModel, decode_images, encode_prompt, visiting
from ..models.model import Model
from ..models.transformer_model import TransformerModel
from ..nets.conditioning import Conditioning
from ..progress import Stop, Stopped
from ..seeds import check_seed
from .flow import euler
from .two_path import check_paths, two_path

AT_A_TIME = 20  # pictures that are drawn before they are written


@dataclass(frozen=True)
class SampleSettings:
    """How to sample; the same seed gives the same picture on the same machine, but for rounding if others are drawn
    together with it."""

    steps: int = 30
    """Denoising steps."""
    guidance: float | None = None
    """Scale of classifier-free guidance, or what a distilled network is told of it; None is the model's usual one."""
    negative: str = ""
    """The negative prompt."""
    strength: float = 1.0
    """Of the LoRA: 0 is none, 1 as trained."""
    refresh: int = 1
    """Run the base path every n-th step; between, its exit activation is used again."""
    size: tuple[int, int] | None = None
    """(height, width) in pixels; None is the model's native size."""
    together: int = 1
    """Pictures that are drawn at once: faster where the GPU is not busy with one, for the memory of so many."""

    def guidance_of(self, model: Model) -> float:
        """`guidance`, or the model's usual one."""
        return model.usual_guidance if self.guidance is None else self.guidance

    def __post_init__(self) -> None:
        """Raises HollowError for a value that cannot be."""
        if not 1 <= self.steps <= 1000:
            raise HollowError(f"{self.steps} denoising steps cannot be. Take from 1 to 1000; 30 are usual.")
        check_paths(self.strength, self.refresh)
        if self.guidance is not None and not 0 <= self.guidance < math.inf:
            raise HollowError(f"A guidance of {self.guidance} cannot be. Take 1 for none; 7.5 is usual.")
        if self.together < 1:
            raise HollowError(f"{self.together} pictures cannot be drawn together. It must be at least 1.")
        for side in self.size or ():
            check_resolution(side)


class Texts(NamedTuple):
    """Prompts as the text encoders leave them."""

    guided: list[dict[str, Any]]
    """As `encode_guided` gives each."""
    generic: list[Conditioning]
    """What the base path sees of each; empty where there is one path only."""
    recipe: Recipe | None
    """That of the two paths; None where there is one only."""


def sample(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SampleSettings = SampleSettings(),
    *,
    lora: LoraFile | None = None,
    single_path: bool = False,
    generics: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[Image.Image]:
    """One picture a prompt and seed.

    A LoRA of a hollowed training is used on two paths (Hollowed Net, Sec. 4.3) with each prompt's
    generic form or, if given, its one of `generics`; any other LoRA, or `single_path`, on the ordinary one. Text
    encoders, U-Net and VAE visit `device` in turn; None leaves them where they are. `progress` is told how many of
    how many are drawn. Raises HollowError for another number of seeds or generic prompts than of prompts, for a number
    that is no seed, and for a LoRA that does not fit the model.
    """
    _check_seeds(len(prompts), seeds)
    texts = encode(model, prompts, settings, lora=lora, single_path=single_path, generics=generics, device=device)
    drawn = portions(model, texts, seeds, settings, lora=lora, device=device, progress=progress)
    return [picture for portion in drawn for picture in portion]


def encode(
    model: Model,
    prompts: Sequence[str],
    settings: SampleSettings = SampleSettings(),
    *,
    lora: LoraFile | None = None,
    single_path: bool = False,
    generics: Sequence[str] | None = None,
    device: torch.device | str | None = None,
) -> Texts:
    """What `portions` draws of, for the same settings and LoRA; the arguments are those of `sample`."""
    if generics is not None and len(generics) != len(prompts):
        raise HollowError(
            f"There are {len(prompts)} prompts and {len(generics)} generic ones. Give one for each prompt."
        )
    recipe = None if lora is None or single_path else lora.recipe
    size = settings.size or (model.resolution, model.resolution)
    with visiting(device, *model.text_encoders):
        guided = {prompt: encode_guided(model, prompt, settings) for prompt in dict.fromkeys(prompts)}
        if recipe is None or not recipe.two_paths:
            return Texts([guided[prompt] for prompt in prompts], [], None)
        generics = generics or [generic_prompt(prompt, recipe.identifier) for prompt in prompts]
        generic = {text: encode_prompt(model, text, size) for text in dict.fromkeys(generics)}
    return Texts([guided[prompt] for prompt in prompts], [generic[text] for text in generics], recipe)


def unheard(model: Model, prompts: Sequence[str], lora: LoraFile) -> list[str]:
    """Those of the prompts that name the LoRA's subject so far behind that no text encoder reads it."""
    identifier = "" if lora.recipe is None else lora.recipe.identifier

    def heard(prompt: str) -> bool:
        with suppress(HollowError):  # nothing but the identifier, which is read
            generic = generic_prompt(prompt, identifier)
            return generic == prompt or model.tokens(generic) != model.tokens(prompt)
        return True

    return [prompt for prompt in dict.fromkeys(prompts) if not heard(prompt)]


def portions(
    model: Model,
    texts: Texts,
    seeds: Sequence[int],
    settings: SampleSettings = SampleSettings(),
    *,
    lora: LoraFile | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], object] | None = None,
    stop: Stop | None = None,
) -> Iterator[list[Image.Image]]:
    """`sample` of encoded prompts, handing out some twenty pictures whenever they are drawn: to be written, before
    the next ones are asked for. `stop` is asked before each such portion."""
    number, recipe = len(texts.guided), None if lora is None else texts.recipe
    _check_seeds(number, seeds)
    size = settings.together * max(AT_A_TIME // settings.together, 1)  # full batches

    def draw_portion(portion: slice) -> list[Image.Image]:
        latents: list[torch.Tensor] = []
        with _lora(model, lora, settings.strength), visiting(device, model.network.module):
            for few in slices(portion.start, portion.stop, settings.together):
                generic = None if recipe is None else Conditioning.batch(texts.generic[few])
                latents += draw(
                    model, model.batch_guided(texts.guided[few]), seeds[few], settings, recipe, generic
                ).split(1)
                if progress is not None:
                    progress(few.stop, number)
        with visiting(device, model.vae):
            return decode_images(model, latents)

    of_all = slices(0, number, size)
    return (draw_portion(portion) for portion in takewhile(lambda _: stop is None or not stop(), of_all))


def _check_seeds(number: int, seeds: Sequence[int]) -> None:
    if len(seeds) != number:
        raise HollowError(f"There are {number} prompts and {len(seeds)} seeds. Give one seed for each prompt.")
    for seed in seeds:
        check_seed(seed)


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """From `start` to `stop`, each of `size` but for the last."""
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


def encode_guided(model: Model, prompt: str, settings: SampleSettings) -> dict[str, Any]:
    """A prompt and the negative one as `draw` takes them, by the names of the model's kind."""
    return model.encode_guided(prompt, settings.negative, settings.guidance_of(model))


@singledispatch
def draw(
    model: Model,
    text: dict[str, Any],
    seeds: Sequence[int],
    settings: SampleSettings,
    recipe: Recipe | None = None,
    generic: Conditioning | None = None,
    stop: Stop | None = None,
) -> torch.Tensor:
    """Scaled latents (batch, channels, height / 8, width / 8) from what `encode_guided` gives for one prompt or,
    together by the model's `batch_guided`, for several, each with its seed; by the network alone, on two paths where
    there is a recipe. `stop` is asked at each denoising step. Raises HollowError for what the model's kind cannot do,
    and Stopped."""
    # of Stable Diffusion, by diffusers' pipeline; a transformer's is below
    assert isinstance(model, BaseModel)
    pipeline = replace(model, vae=None, text_encoders=()).pipeline()
    pipeline.vae_scale_factor = model.pixels_per_latent
    pipeline.set_progress_bar_config(disable=True)
    height, width = settings.size or (model.resolution, model.resolution)
    paths: Any = nullcontext()
    if recipe is not None and generic is not None:
        assert not isinstance(recipe.cut, tuple)
        paths = two_path(pipeline, cut=recipe.cut, generic=generic, refresh=settings.refresh)

    def ask(*step: Any) -> dict[str, Any]:
        if stop is not None and stop():
            raise Stopped
        return {}

    with paths:
        return pipeline(
            **text,
            height=height,
            width=width,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_of(model),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],  # the CPU's: alike on every device
            output_type="latent",
            callback_on_step_end=ask,
        ).images


@draw.register
def _(
    model: TransformerModel,
    text: dict[str, Any],
    seeds: Sequence[int],
    settings: SampleSettings,
    recipe: Recipe | None = None,
    generic: Conditioning | None = None,
    stop: Stop | None = None,
) -> torch.Tensor:
    """By Euler's steps, on one path."""
    if recipe is not None or settings.refresh != 1:
        raise HollowError(
            f"{model.family.title} draws on one path, with nothing to refresh. Take a LoRA that was trained on it, and "
            "leave --refresh out."
        )
    size, step = settings.size or (model.resolution, model.resolution), 2 * model.pixels_per_latent
    for side in size:
        if side % step:
            raise HollowError(f"{model.family.title} draws in steps of {step} pixels, but {side} is none. Round it.")
    height, width = (side // model.pixels_per_latent for side in size)
    shape = 1, model.family.channels(model.network.config), height, width
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return euler(model, text, torch.cat(noise), settings.steps, settings.guidance_of(model), stop)


@contextmanager
def _lora(model: Model, lora: LoraFile | None, strength: float) -> Iterator[None]:
    if lora is None:
        yield
        return
    trained_for = None if lora.recipe is None else lora.recipe.prediction_type
    if trained_for not in (None, model.schedule.prediction.name):
        raise HollowError(
            f"The LoRA was trained on a model of prediction type {trained_for}, this one is of "
            f"{model.schedule.prediction.name}. Use it with the model it was trained on."
        )
    network = model.network.module
    load_lora_state(network, lora.state, lora.alpha)
    set_strength(network, strength)
    try:
        yield
    finally:
        remove_lora(network)
