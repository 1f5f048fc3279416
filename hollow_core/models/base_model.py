"""A base model from a diffusers folder or a single file, and what it makes of prompts and pictures.

`BaseModel` is one of Stable Diffusion, with a U-Net; `transformer_model.TransformerModel` is the other kind. What is
below them here takes either: a `Model`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..data.images import TrainingImage
from ..data.patches import Place
from ..errors import HollowError
from ..nets.conditioning import Conditioning
from ..nets.families import TITLES
from ..nets.network import Network
from ..nets.residency import Bits, quantize, stream
from ..nets.schedule import PREDICTIONS, NoiseSchedule
from ..nets.unet import UNet
from ..nets.unet_layers import Config, check_config, layers
from ..progress import Stop, unless_stopped
from . import layouts
from . import vae as any_vae
from .layouts import layout_name
from .model import Model, Outlines, TimestepSampling, maker_of, without_data
from .parts import load_part, outline_part, read_config, read_index
from .schedulers import diffusion_scheduler
from .single_file import file_part, recognise, sample_size, tokenizers
from .stored import StoredWeights
from .transformer_model import family_at, load_transformer, outline_transformer


@dataclass
class BaseModel:
    """The parts of a base model with a U-Net; a `Model`. Raises HollowError for a U-Net that training, drawing or LoRA
    files do not know, before any stage could find it out, and for a VAE that does not fit it."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny | None
    text_encoders: tuple[nn.Module, ...]
    """One, or SDXL's two; empty once set free."""
    tokenizers: tuple[CLIPTokenizer, ...]
    scheduler: DDPMScheduler
    """diffusers' form of the noise schedule: its prediction type, its betas, zero terminal SNR or not."""
    layout: str
    """"sd15", "sd21", "sdxl" or "other"."""
    resolution: int
    """The native side of a picture in pixels."""
    prompt_chunks: int = 1
    """In how many chunks of 75 tokens every prompt is read, one by one; what is behind them is not read."""

    def __post_init__(self) -> None:
        """As said."""
        check_config(self.unet.config)
        taken = self.unet.config.in_channels
        if self.vae is not None and (made := any_vae.latent_channels(self.vae.config)) != taken:
            raise HollowError(
                f"The VAE makes latents of {made} channels, but the U-Net takes {taken}. Get the whole model."
            )

    @property
    def network(self) -> Network:
        """The U-Net, for what knows no kind of network."""
        return UNet(self.unet)

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of training. Raises HollowError for a prediction type that is unknown."""
        return NoiseSchedule.from_scheduler(self.scheduler)

    @property
    def latent_side(self) -> int:
        """The native side of a picture in latents."""
        return int(self.unet.config.sample_size)

    @property
    def pixels_per_latent(self) -> int:
        """To a side."""
        return self.resolution // self.latent_side

    @property
    def large_encoders(self) -> tuple[nn.Module, ...]:
        """None: CLIP is small."""
        return ()

    @property
    def usual_guidance(self) -> float:
        """Scale of classifier-free guidance, as everybody takes it."""
        return 7.5

    def schedule_for(self, sampling: TimestepSampling | None, side: int) -> NoiseSchedule:
        """The model's own, whose time steps are drawn all alike, for pictures of any size. Raises HollowError where
        they are to be drawn otherwise."""
        if sampling is not None:
            raise HollowError(
                f"Time steps can be drawn {sampling} only for a model of flow matching, as transformers are, but this "
                "one has a U-Net. Leave --timestep-sampling out."
            )
        return self.schedule

    def pipeline(self) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        """A diffusers pipeline of these very parts, with DDIM as sampler; set `.scheduler` for another."""
        sampling: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
        if self.scheduler.config.rescale_betas_zero_snr:
            # A schedule that ends in pure noise must be sampled from there, which only trailing steps do
            # (Lin et al., "Common Diffusion Noise Schedules and Sample Steps Are Flawed", section 3.3).
            sampling["timestep_spacing"] = "trailing"
        parts: dict[str, Any] = {
            "unet": self.unet,
            "vae": self.vae,
            "text_encoder": self.text_encoders[0] if self.text_encoders else None,
            "tokenizer": self.tokenizers[0],
            "scheduler": DDIMScheduler.from_config(self.scheduler.config, **sampling),
        }
        if self.layout == "sdxl":
            second = self.text_encoders[1] if self.text_encoders else None
            return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=self.tokenizers[1])
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )

    def outlines(self) -> Outlines:
        """What gives models of the same parts, of tensors without data; it keeps nothing of the weights."""
        assert self.vae is not None
        makers = [maker_of(part) for part in (self.unet, self.vae, *self.text_encoders)]
        others = self.tokenizers, self.scheduler, self.layout, self.resolution

        def give(dtype: torch.dtype) -> BaseModel:
            unet, vae, *encoders = without_data(makers, dtype)
            return BaseModel(unet, vae, tuple(encoders), *others)

        return give

    @torch.no_grad()
    def encode_prompt(self, text: str, size: tuple[int, int] | None = None) -> Conditioning:
        """What the U-Net sees of a prompt: exactly what the diffusers pipeline hands it.

        encoder_hidden_states are (1, 77 · chunks, width). SDXL also sees the picture's `size`, (height, width) in
        pixels, as original and as target size, uncropped; None is the native size.
        Raises HollowError where the text encoder was set free.
        """
        if not self.text_encoders:
            raise HollowError("The text encoder was set free already. Encode all prompts before free_encoders.")
        device = next(self.text_encoders[0].parameters()).device
        embeds, _, *pooled = self.pipeline().encode_prompt(
            self.chunks(text), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        embeds = embeds.flatten(0, 1)[None]
        if self.layout != "sdxl":
            return Conditioning(embeds, None, None)
        height, width = size or (self.resolution, self.resolution)
        return Conditioning(embeds, pooled[0][:1], embeds.new_tensor([[height, width, 0, 0, height, width]]))

    @torch.no_grad()
    def encode_guided(self, prompt: str, negative: str, guidance: float) -> dict[str, Any]:
        """A prompt and, where it guides, the negative one, by the pipeline's names."""
        embeds = self.pipeline().encode_prompt(
            prompt=self.chunks(prompt),
            device=next(self.text_encoders[0].parameters()).device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guidance > 1,
            negative_prompt=self.chunks(negative),
        )
        tokens = [part if part is None else part.flatten(0, 1)[None] for part in embeds[:2]]
        pooled = [part if part is None else part[:1] for part in embeds[2:]]
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return dict(zip(names, [*tokens, *pooled], strict=False))

    def chunks(self, text: str) -> list[str]:
        """A prompt in the parts that are read, as many as `prompt_chunks`, the last of which may be empty."""
        if self.prompt_chunks == 1:
            return [text]
        return [*in_chunks(text, self.tokenizers[0]), *[""] * self.prompt_chunks][: self.prompt_chunks]

    def tokens(self, text: str) -> list[list[int]]:
        """Those of a prompt that are read, by each text encoder and chunk."""
        return [
            list(tokenizer(chunk, truncation=True, max_length=tokenizer.model_max_length).input_ids)
            for tokenizer in self.tokenizers
            for chunk in self.chunks(text)
        ]

    def batch_guided(self, texts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Every tensor (batch, …)."""
        return {
            name: None if part is None else torch.cat([text[name] for text in texts]) for name, part in texts[0].items()
        }

    def free_encoders(self) -> None:
        """Let go of VAE and text encoders."""
        self.vae, self.text_encoders = None, ()


def load(
    path: Path,
    dtype: torch.dtype = torch.float32,
    *,
    prediction_type: str | None = None,
    config: Path | None = None,
) -> Model:
    """Load a diffusers folder, or a single .safetensors file of SD 1.x, SD 2.x or SDXL, onto the CPU.

    `prediction_type` ("epsilon", "v_prediction", "sample") overrides what the model says of itself: a folder
    in its scheduler's config, a file by its markers. Transformers have none: they learned flow matching. `config` is
    for a single file whose layers have other sizes than the public models': a diffusers folder with configs and
    tokenizers.
    Raises HollowError for a path that does not exist, a pickle, a LoRA, models of any other kind, and those that
    learned other noise (EDM, LCM, flow matching with a U-Net).
    """
    if prediction_type not in (None, *PREDICTIONS):
        choices = ", ".join(PREDICTIONS)
        raise HollowError(f"There is no prediction type {prediction_type!r}. Choose one of {choices}.")
    _check_path(path)
    if path.is_dir() and (family := family_at(path)) is not None:
        if prediction_type:
            raise HollowError(
                f"{family.title} learned flow matching, so it has no prediction type {prediction_type!r}. Leave "
                "--prediction-type out."
            )
        return load_transformer(path, dtype)
    if path.is_dir():
        return _assembled(path, path, partial(load_part, path, dtype=dtype), told=prediction_type)
    config, schedule = recognise(path, config)
    part = partial(file_part, StoredWeights(path, dtype), config)
    return _assembled(path, config, part, schedule, prediction_type)


def outline(model: str, dtype: torch.dtype = torch.float32, *, prediction_type: str | None = None) -> Model:
    """What `load` gives, of tensors that hold no data (on PyTorch's "meta" device): for a dry run.

    `model` is a layout ("sd15", "sd21", "sdxl", or one of transformers) or a path as for `load`; only configs,
    tokenizers and a file's header are read. `prediction_type` as for `load`. Raises HollowError as it does, but does
    not see whether a folder has its weights.
    """
    folder = layouts.FOLDER / model
    if model not in (*layouts.LAYOUTS, *layouts.TRANSFORMERS):
        folder = Path(model)
        _check_path(folder)
        if not folder.is_dir():
            config, schedule = recognise(folder)
            part = partial(file_part, StoredWeights(folder, dtype, outlined=True), config)
            return _assembled(folder, config, part, schedule, prediction_type)
    if family_at(folder) is not None:
        return outline_transformer(folder, dtype)
    return _assembled(folder, folder, partial(outline_part, folder, dtype=dtype), told=prediction_type)


def outlines(model: Model) -> Outlines:
    """What gives the `outline` of a loaded model in a dtype; it keeps nothing of the weights."""
    return model.outlines()


def outline_unet(config: Config, dtype: torch.dtype) -> BaseModel:
    """As `outline`, but without anything beside the U-Net; a side of a latent is 8 pixels."""
    (unet,) = without_data([partial(UNet2DConditionModel.from_config, config)], dtype)
    return BaseModel(unet, None, (), (), DDPMScheduler(), layout_name(config), 8 * config["sample_size"])


def encode_prompt(model: Model, text: str, size: tuple[int, int] | None = None) -> Conditioning:
    """What the network sees of a prompt: exactly what the diffusers pipeline hands it.

    SDXL also sees the picture's `size`, (height, width) in pixels, as original and as target size, uncropped; None is
    the native size. Raises HollowError where the text encoder was set free.
    """
    return model.encode_prompt(text, size)


def read_in_chunks(model: Model, number: int) -> None:
    """Let every prompt be read in so many chunks of 75 tokens, as ComfyUI and A1111 read long ones, and kohya's trainer
    with its max_token_length: each chunk by itself, what comes of them one behind the other, SDXL's pooled embedding
    that of the first. Raises HollowError for a number below 1, and for a transformer, whose prompts may be long."""
    if not isinstance(model, BaseModel):
        raise HollowError("Transformers read long prompts at once. Leave --prompt-chunks out.")
    if number < 1:
        raise HollowError(f"A prompt cannot be read in {number} chunks. Take 1, or 2 or 3 for long ones.")
    model.prompt_chunks = number


def chunks_lacking(model: Model, text: str) -> int:
    """In how many chunks a prompt would be read whole that is not now; 0 where it is, and of a transformer."""
    if not isinstance(model, BaseModel):
        return 0
    needed = len(in_chunks(text, model.tokenizers[0]))
    return needed if needed > model.prompt_chunks else 0


def in_chunks(text: str, tokenizer: CLIPTokenizer) -> list[str]:
    """A prompt in parts of no more tokens than CLIP reads at once, broken between words where there are any."""
    room = tokenizer.model_max_length - 2  # for what marks beginning and end

    def length(words: str) -> int:
        return len(tokenizer(words, add_special_tokens=False, verbose=False).input_ids)

    chunks, used = [""], 0
    for word in text.split():
        # A letter has at most four bytes, and a byte is one token at most.
        step = len(word) if length(word) <= room else room // 4
        for part in (word[start : start + step] for start in range(0, len(word), step)):
            if used + length(part) > room:
                chunks.append("")
                used = 0
            chunks[-1] = f"{chunks[-1]} {part}".strip()
            used += length(part)
    return chunks


def told(prompt: Conditioning, time_ids: Sequence[int]) -> Conditioning:
    """An encoded prompt that tells SDXL of a picture's sizes as `TrainingImage.time_ids` does; others are not told."""
    if prompt.time_ids is None:
        return prompt
    return prompt._replace(time_ids=prompt.time_ids.new_tensor([list(time_ids)]))


def placed(prompt: Conditioning, place: Place) -> Conditioning:
    """An encoded prompt of a crop that is there in the whole picture, for a network whose tokens have places."""
    return prompt._replace(place=torch.tensor([place]))


def latent_mask(image: TrainingImage, latents: Tensor) -> Tensor | None:
    """A picture's mask at the size of its latents (1, channels, height, width): (1, 1, height, width) from 0 to 1."""
    if image.mask is None:
        return None
    height, width = latents.shape[-2:]
    small = image.mask.resize((width, height), Image.Resampling.BOX)
    return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).reshape(1, 1, height, width) / 255


@torch.no_grad()
def encode_images(model: Model, images: Sequence[TrainingImage], stop: Stop | None = None) -> list[Tensor]:
    """The scaled latents of each picture, (1, channels, height / 8, width / 8) for SD: the posterior's mean.

    `stop` is asked before each. Raises HollowError where the VAE was set free, and Stopped.
    """
    if model.vae is None:
        raise HollowError("The VAE was set free already. Encode all pictures before free_encoders.")
    vae, dtype, latents = model.vae, model.vae.dtype, []
    with _without_overflow(vae):
        for image in unless_stopped(images, stop):
            pixels = torch.frombuffer(bytearray(image.picture.tobytes()), dtype=torch.uint8)
            pixels = pixels.reshape(1, image.picture.height, image.picture.width, 3).permute(0, 3, 1, 2)
            scaled = (pixels / 127.5 - 1).to(vae.device, vae.dtype)
            latents.append(any_vae.to_latents(vae, scaled).to(dtype))
    return latents


@torch.no_grad()
def decode_images(model: Model, latents: Sequence[Tensor]) -> list[Image.Image]:
    """The pictures that scaled latents, (1, channels, height / 8, width / 8) each for SD, stand for.

    Raises HollowError where the VAE was set free.
    """
    if model.vae is None:
        raise HollowError("The VAE was set free already. Decode all latents before free_encoders.")
    vae, processor, pictures = model.vae, VaeImageProcessor(), []
    with _without_overflow(vae):
        for scaled in latents:
            pixels = any_vae.to_pixels(vae, scaled.to(vae.device, vae.dtype))
            pictures += processor.postprocess(pixels, output_type="pil")
    return pictures


@contextmanager
def _without_overflow(vae: nn.Module) -> Iterator[None]:
    """Inside, a VAE that was loaded in fp16 computes in fp32: SDXL's would overflow."""
    half = vae.dtype == torch.float16
    if half:
        vae.to(torch.float32)
    yield
    if half:
        vae.to(torch.float16)


@contextmanager
def visiting(device: torch.device | str | None, *parts: nn.Module | None) -> Iterator[None]:
    """Inside, `parts` are on `device`, then on the CPU; None leaves them where they are."""
    there = [part for part in parts if part is not None and device is not None]
    for part in there:
        part.to(device)
    try:
        yield
    finally:
        for part in there:
            part.to("cpu")


def keep_small(
    model: Model,
    device: torch.device | str,
    *,
    base_bits: Bits | None = None,
    streaming: bool = False,
    tiled_vae: bool = False,
) -> None:
    """Take memory off a model, for all that is done with it on `device`.

    `base_bits` are of a weight of the network, and of large text encoders; `streaming` keeps the weights of network and
    text encoders in main memory, from where they visit the device; `tiled_vae` has pictures encoded and decoded in
    tiles. Raises HollowError as `residency` does.
    """
    network = model.network
    if base_bits is not None:
        quantize(network.module, base_bits, network.kept)
        for encoder in model.large_encoders:
            quantize(encoder, base_bits)
    if streaming:
        stream(network.module, device, network.kept)
        for encoder in model.text_encoders:
            stream(encoder, device)
    if tiled_vae:
        tile_vae(model)


def tile_vae(model: Model) -> None:
    """Let the VAE take pictures in overlapping tiles of half the native side: a fraction of the memory, and close
    to the same. An AutoencoderTiny needs little, and stays as it is."""
    any_vae.tile(model.vae, model.resolution // 2, model.latent_side // 2)


def free_encoders(model: Model) -> None:
    """Let go of VAE and text encoders: precomputing and training need only their outputs."""
    model.free_encoders()


def _check_path(path: Path) -> None:
    if not path.exists():
        raise HollowError(f"{path} does not exist. Give a .safetensors checkpoint or a diffusers folder.")
    if not path.is_dir() and path.suffix.lower() != ".safetensors":
        raise HollowError(
            f"{path} is no .safetensors file. Pickles (.ckpt, .pt, .bin) are never read, since they can run "
            "any code: get the model as .safetensors."
        )


_PIPELINES = {
    "StableDiffusionPipeline": {"text_encoder": CLIPTextModel},
    "StableDiffusionXLPipeline": {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection},
}
"""What reads the prompt in each."""


def _assembled(
    model: Path,
    folder: Path,
    part: Callable[[str, Any], Any],
    schedule: Mapping[str, Any] | None = None,
    told: str | None = None,
) -> BaseModel:
    """Of what `part` gives for a name in the folder's pipeline and its class. `schedule` is what a single file, the
    `model`, tells of its noise schedule, beside that folder's configs; the prediction type that a person has
    `told` counts more."""
    encoders = _encoders_of(folder)
    _check_unet(folder, len(encoders))
    scheduler = diffusion_scheduler(folder, {**(schedule or {}), **({"prediction_type": told} if told else {})}, model)
    vae_kind = _one_of(folder, "vae", (AutoencoderKL, AutoencoderTiny), read_config(folder, "vae").get("_class_name"))
    unet, vae = part("unet", UNet2DConditionModel), part("vae", vae_kind)
    layers(unet.config)  # which refuses a pruned one by name, before anything is done with it
    unet.register_to_config(sample_size=sample_size(folder, schedule or {}, unet.config.sample_size))
    texts = tuple(part(name, kind) for name, kind in encoders.items())
    return BaseModel(
        unet=unet,
        vae=vae,
        text_encoders=texts,
        tokenizers=tokenizers(folder, [name.replace("text_encoder", "tokenizer") for name in encoders], texts),
        scheduler=scheduler,
        layout=layout_name(unet.config),
        resolution=_side(folder, unet.config) * any_vae.pixels_per_latent(vae.config),
    )


def _encoders_of(folder: Path) -> dict[str, Any]:
    """The classes of text encoders by their names. Raises HollowError for a pipeline of another kind, and for one that
    lacks a part."""
    index = read_index(folder)
    encoders = _PIPELINES.get(index["_class_name"])
    if encoders is None:
        raise HollowError(
            f"{folder} holds a {index['_class_name']}. Hollow takes text-to-image models: SD 1.x, SD 2.x, SDXL, and of "
            f"transformers {TITLES}."
        )
    for name in ("unet", "vae", *encoders):
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) < 2 or entry[1] is None:
            raise HollowError(f"{folder} lacks its {name}. Get the whole model.")
        if name in encoders:
            _one_of(folder, name, (CLIPTextModel, CLIPTextModelWithProjection), entry[1])
    return encoders


def _check_unet(folder: Path, encoders: int) -> None:
    """Raises HollowError for a U-Net of another class, of another kind than `check_config` knows, and for one that does
    not belong to so many text encoders."""
    config, listed = read_config(folder, "unet"), read_index(folder)
    for called in (listed["unet"][1], config.get("_class_name", UNet2DConditionModel.__name__)):
        _one_of(folder, "unet", (UNet2DConditionModel,), called)
    check_config(config)
    if (encoders == 2) != (config.get("addition_embed_type") == "text_time"):
        raise HollowError(f"{folder} is a {listed['_class_name']} with the U-Net of another. Get the whole model.")


def _one_of(folder: Path, name: str, kinds: Sequence[type[Any]], called: Any) -> type[Any]:
    """The class of these that is called so. Raises HollowError for any other."""
    found = next((kind for kind in kinds if kind.__name__ == called), None)
    if found is None:
        known = " or ".join(kind.__name__ for kind in kinds)
        raise HollowError(f"The {name} of {folder} is a {called}. Hollow takes {known} there.")
    return found


def _side(folder: Path, unet: Config) -> int:
    """Of the native latents."""
    side = unet.get("sample_size")
    if not isinstance(side, int) or side < 1:
        raise HollowError(
            f"{folder / 'unet' / 'config.json'} has the sample_size {side}. Write the side of the model's latents "
            "there, 64 for pictures of 512 pixels."
        )
    return side
