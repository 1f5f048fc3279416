"""The whole road: pictures in, a LoRA file out. Each stage leaves on disk what it made, so a stopped run goes on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import torch

from .data.images import TrainingImage, at_resolution, check_resolution
from .data.prompts import generic_prompt, personal_prompt
from .errors import HollowError
from .lora import file as lora_file
from .lora.file import Written
from .lora.layers import ATTENTION
from .lora.metadata import recipe_for
from .memory.meter import Meter, free_bytes
from .memory.planner import Planner
from .memory.remedy import memory_told
from .memory.setting import Setting
from .models.base_model import (
    BaseModel,
    decode_images,
    encode_images,
    encode_prompt,
    free_encoders,
    outlines,
    told_size,
    visiting,
)
from .nets.network import Network, at_cut
from .nets.residency import stream_middle
from .progress import Progress, Stop, Watch
from .sampling.prior import class_latents
from .training.optimizer import optimizer_class
from .training.precompute import Example, model_id, precompute
from .training.selective import save_schedule
from .training.settings import DTYPES
from .training.store import Kind, Store
from .training.train import TrainResult, train

LORA_FILE = "lora.safetensors"
SCHEDULE_FILE = "schedule.png"


@dataclass(frozen=True)
class Request:
    """What to personalise, and how."""

    images: Sequence[TrainingImage]
    """The subject's pictures, all of one size; a caption, where there is one, is the picture's personal prompt."""
    class_word: str
    """What the subject is, in a common word: "dog"."""
    identifier: str = "sks"
    """The rare word by which prompts will call it."""
    setting: Setting = field(default_factory=Setting)
    """Every lever; its resolution, where it names one, is that of the pictures."""
    class_folder: Path | None = None
    """Where runs of one class share the pictures of it, drawn with the seed 0; None draws the run's own, with its
    seed."""
    thumbnail: bool = False
    """Whether the LoRA file shows the first picture, small, to tools that list files."""

    @property
    def side(self) -> int:
        """Of the pictures, in pixels."""
        return self.images[0].picture.width


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    file: Path | None
    """The LoRA; None if the run was stopped before training."""
    result: TrainResult | None
    store: Store | None
    meter: Meter
    written: Written | None = None
    """What reading the LoRA back found."""


def personalize(
    load: Callable[[], BaseModel],
    request: Request,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[str, Progress], object] | None = None,
    stop: Stop | None = None,
) -> Outcome:
    """Encode, precompute, train and save into `folder`; called again after any interruption, it goes on.

    The strategy selective leaves a picture of its schedule there, too, with the steps that were taken.

    `load` gives the base model, on the CPU, and keeps no reference to it. Its parts visit `device` in turn: VAE,
    text encoders, the U-Net up to the exit, and what is left of it; the whole U-Net only to draw class pictures. What
    no later stage needs leaves memory: the encoders before precomputing, the middle before training. `progress`
    is called with the name of the stage, "class pictures", "precompute" or "train". Raises HollowError as
    the stages do, and where memory runs out, saying what to change.
    """
    _check(request)
    setting = replace(request.setting, resolution=request.side)
    training = setting.training
    meter = Meter(torch.device(device))

    def watch(stage: str) -> Watch | None:
        return None if progress is None else lambda done: progress(stage, done)

    with meter.stage("encode"):
        model = load()
        _check_cut(setting, model.network)
        torch.nn.Module.to(model.network.module, DTYPES[training.precision])  # without diffusers' advice
        told = partial(
            memory_told,
            cache(partial(Planner, outlines(model))),
            setting=setting,
            free=partial(free_bytes, torch.device(device)),
        )
        made_by = model_id(model.network) if setting.class_images or setting.base_bits is None else ""
        setting.keep_small(model, device)
        with told("encode", going_on=(folder / "store").exists()):
            drawn: list[torch.Tensor] = []
            if setting.class_images:
                drawn = class_latents(
                    model,
                    class_prompts(request),
                    request.class_folder or folder / "class",
                    made_by=made_by,
                    resolution=request.side,
                    seed=training.seed if request.class_folder is None else 0,
                    together=training.together,
                    device=device,
                    progress=watch("class pictures"),
                    stop=stop,
                )
                if len(drawn) < setting.class_images:
                    return Outcome(None, None, None, meter)
            examples = make_examples(model, request, drawn, device)
            if training.strategy == "selective":
                examples += low_examples(model, request, examples, drawn, device)
        free_encoders(model)
        if setting.base_bits is not None:  # other weights, then
            made_by = model_id(model.network)

    with meter.stage("precompute"), told("precompute"):
        if setting.cut is not None:
            if setting.stream_middle and not setting.streaming:
                stream_middle(model.network, setting.cut, device)
            model.network.base(setting.cut).module.to(device)
        store = precompute(
            model.network,
            model.schedule,
            examples,
            folder / "store",
            cut=setting.cut,
            samples=setting.samples,
            seed=training.seed,
            dtype=setting.store_dtype,
            together=training.together,
            made_by=made_by,
            progress=watch("precompute"),
            stop=stop,
        )
    if store.missing:
        return Outcome(None, None, store, meter)

    schedule, config, layout = model.schedule, model.network.config, model.layout
    network = at_cut(model.network, setting.cut, {record.timestep for record in store.records})
    del model  # here the middle leaves memory
    with meter.stage("train"), told("train"):
        network.module.to(device)
        result = train(network, schedule, store, training, folder=folder, progress=watch("train"), stop=stop)

    recipe = recipe_for(setting.cut, request.identifier, request.class_word, schedule.prediction.name)
    file = folder / LORA_FILE
    picture = request.images[0].picture if request.thumbnail else None
    alpha = training.lora_alpha
    written = lora_file.save(file, result.state, config, alpha=alpha, layout=layout, recipe=recipe, picture=picture)
    if training.strategy == "selective" and result.stopped == "finished":
        save_schedule(folder / SCHEDULE_FILE, training.bp_low_probability, result.taken, len(schedule))
    return Outcome(file, result, store, meter, written)


def make_examples(
    model: BaseModel,
    request: Request,
    class_latents: Sequence[torch.Tensor],
    device: torch.device | str | None = None,
) -> list[Example]:
    """The subject's pictures with their prompts, then those of the class with the generic one.

    VAE and text encoders visit `device` in turn; None leaves them where they are.
    Raises HollowError for an empty class word and for a caption that lacks the identifier.
    """
    encode = cache(partial(encode_prompt, model, size=(request.side, request.side)))
    with visiting(device, model.vae):
        encoded_images = encode_images(model, request.images)
    examples = []
    with visiting(device, *model.text_encoders):
        for image, latents in zip(request.images, encoded_images, strict=True):
            personal = _prompt(request, image)
            generic = generic_prompt(personal, request.identifier)
            examples.append(Example(latents, encode(personal), encode(generic), personal, generic))
        for latents, prompt in zip(class_latents, class_prompts(request), strict=True):
            conditioning = encode(prompt)
            examples.append(Example(latents, conditioning, conditioning, prompt, prompt, "prior"))
    return examples


def low_examples(
    model: BaseModel,
    request: Request,
    examples: Sequence[Example],
    class_latents: Sequence[torch.Tensor],
    device: torch.device | str | None = None,
) -> list[Example]:
    """The twins of `examples`, of `make_examples`, at the lower resolution, whose size SDXL is told; class pictures are
    decoded.

    Raises HollowError for a resolution that is no multiple of 8, or not below that of the pictures.
    """
    full, side = request.side, low_side(request)
    with visiting(device, model.vae):
        pictures = decode_images(model, class_latents)
        of_class = [TrainingImage(picture, None, "", (0, 0, full, full)) for picture in pictures]
        latents = encode_images(model, [at_resolution(image, side) for image in (*request.images, *of_class)])
    kinds: dict[Kind, Kind] = {"image": "low image", "prior": "low prior"}
    return [
        replace(
            example,
            latents=small,
            personal=told_size(example.personal, (side, side)),
            generic=told_size(example.generic, (side, side)),
            kind=kinds[example.kind],
        )
        for example, small in zip(examples, latents, strict=True)
    ]


def low_side(request: Request) -> int:
    """The side in pixels of the pictures for BP-low. Raises HollowError where it is not below that of the others, or no
    multiple of 8."""
    full, asked = request.side, request.setting.low_resolution
    side = full // 16 * 8 if asked is None else asked
    check_resolution(side)
    if side >= full:
        raise HollowError(f"The low resolution {side} is not below the pictures' {full}. Take half of it.")
    return side


def class_prompts(request: Request) -> list[str]:
    """One for each picture of the class: the generic prompts of the subject's pictures, in turn.

    So the two differ by the identifier alone, and the LoRA must listen to it to tell them apart.
    """
    own = [generic_prompt(_prompt(request, image), request.identifier) for image in request.images]
    return [own[number % len(own)] for number in range(request.setting.class_images)]


def check(request: Request, network: Network) -> None:
    """Raises HollowError where `personalize` would at once, before anything is written."""
    _check(request)
    _check_cut(request.setting, network)


def _check(request: Request) -> None:
    """Refuse at once what would otherwise be refused after the long stages."""
    if not request.images:
        raise HollowError("There are no pictures to learn from. Give four or five of your subject.")
    setting = request.setting
    if setting.resolution not in (None, request.side):
        raise HollowError(
            f"The pictures are {request.side} pixels square, but the setting's resolution is {setting.resolution}. "
            "Load them at that resolution, or leave it out."
        )
    optimizer_class(setting.training.optimizer)
    if setting.training.strategy == "selective":
        low_side(request)
    setting.check()


def _check_cut(setting: Setting, network: Network) -> None:
    """Refuse what no LoRA could be trained on."""
    if setting.cut is None:
        return
    network.check_cut(setting.cut)
    if not network.leaves_attention(setting.cut) and set(setting.training.targets) <= set(ATTENTION):
        least, *_, most = (cut for cut in network.cuts() if network.leaves_attention(cut))
        raise HollowError(
            f"Cut {setting.cut} leaves no attention to put a LoRA on. Choose a cut from {least} to {most}."
        )


def _prompt(request: Request, image: TrainingImage | None) -> str:
    """The personal prompt of a picture: its caption, or the usual sentence."""
    sentence = personal_prompt(request.identifier, request.class_word)
    if image is None or image.caption is None:
        return sentence
    if generic_prompt(image.caption, request.identifier) == image.caption:
        raise HollowError(
            f"The caption of {image.name}, {image.caption!r}, lacks the identifier {request.identifier!r}. "
            "Add it before the class word, or remove the caption."
        )
    return image.caption
