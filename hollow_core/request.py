"""What a person asks for, and the examples it becomes: pictures and prompts, encoded."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path

import torch

from .data.captions import CaptionChanges
from .data.images import TrainingImage, check_resolution, smaller
from .data.patches import check_patches, patch
from .data.prompts import Subject, generic_prompt, personal_prompt
from .errors import HollowError
from .lora.metadata import recipe_for
from .memory.setting import Setting
from .models.base_model import (
    chunks_lacking,
    decode_images,
    encode_images,
    encode_prompt,
    latent_mask,
    placed,
    told,
    visiting,
)
from .models.model import Model
from .progress import Stop
from .training.optimizer import optimizer_class
from .training.precompute import Example
from .training.store import Kind, Record
from .training.train import CHECKPOINT


@dataclass(frozen=True)
class Request:
    """What to personalise, and how."""

    images: Sequence[TrainingImage]
    """The subject's pictures; a caption, where there is one, is the picture's personal prompt."""
    class_word: str = ""
    """What the subject is, in a common word: "dog". May be empty where every picture has a caption or its folder says
    it."""
    identifier: str = "sks"
    """The rare word by which prompts will call it, where no folder says another. Empty for a style or a concept,
    whatever folders say: captions are taken as they are, and the base path sees the same prompt as the personal one."""
    setting: Setting = field(default_factory=Setting)
    """Every lever; its resolution, where it names one, is that of the pictures."""
    class_folder: Path | None = None
    """Where runs of one class share the pictures of it, drawn with the seed 0, be the base in 8 bits or not; None draws
    the run's own, with its seed."""
    thumbnail: bool = False
    """Whether the LoRA file shows the first picture, small, to tools that list files."""
    class_pictures: Sequence[TrainingImage] = ()
    """Own pictures of the class for prior preservation, beside those that the base draws; a caption is their prompt."""
    held_out: Sequence[TrainingImage] = ()
    """Pictures that are not learned: their loss tells what the others teach."""
    captions: CaptionChanges = field(default_factory=CaptionChanges)
    """How captions change from record to record."""
    name: str = "lora"
    """Of the LoRA's file, without .safetensors."""
    keep: int = 10
    """How many of the files that are written along the way stay; 0 writes none."""

    @property
    def resolution(self) -> int:
        """Whose square is about the area of the pictures, in pixels."""
        return self.setting.resolution or round(math.prod(self.size) ** 0.5)

    @property
    def size(self) -> tuple[int, int]:
        """Of the largest picture, width and height in pixels."""
        pictures = [image.picture.size for image in (*self.images, *self.class_pictures, *self.held_out)]
        return max(pictures, key=lambda size: (math.prod(size), size))

    @cached_property
    def subject(self) -> Subject:
        """Whom the pictures show, in words: of several, all."""
        return Subject.all_of(self.subject_of(image) for image in self.images)

    def subject_of(self, image: TrainingImage) -> Subject:
        """Whom a picture shows: as its folder says, else as is asked; without an identifier if none is asked."""
        own = image.subject or Subject(self.identifier, self.class_word)
        return Subject(own.identifier if self.identifier.strip() else "", own.class_word or self.class_word).bare

    def personal_prompt(self, image: TrainingImage) -> str:
        """Its caption, or the usual sentence. Raises HollowError where the caption lacks the identifier, and where
        there is neither caption nor class word."""
        subject = self.subject_of(image)
        if image.caption is None:
            if not subject.class_word:
                raise HollowError(
                    f"{image.where} has no caption, and nothing says what it shows. Give a class word, such as dog, or "
                    "write a caption beside the picture."
                )
            return personal_prompt(*subject)
        if subject.identifier and generic_prompt(image.caption, subject.identifier) == image.caption:
            raise HollowError(
                f"The caption of {image.where}, {image.caption!r}, lacks the identifier {subject.identifier!r}. Add it "
                "before the class word, remove the caption, or learn a style or a concept with an empty identifier."
            )
        return image.caption

    def generic_prompt(self, personal: str) -> str:
        """What the base path sees of a personal prompt: no identifier of any subject."""
        return generic_prompt(personal, self.subject.identifier)

    @property
    def drawn(self) -> list[tuple[str, tuple[int, int]]]:
        """Prompt and size, (height, width) in pixels, of each picture of the class that the base draws: those of the
        subject's pictures, in turn.

        So the prompts differ by the identifier alone, and the LoRA must listen to it to tell them apart.
        """
        own = [
            (self.generic_prompt(self.personal_prompt(image)), (image.picture.height, image.picture.width))
            for image in self.images
        ]
        return [own[number % len(own)] for number in range(self.setting.class_images)]

    def class_prompt(self, image: TrainingImage) -> str:
        """Of an own picture of the class: its caption, or what its folder or the request calls the class."""
        if image.caption is not None:
            return self.generic_prompt(image.caption)
        classes = list(filter(None, dict.fromkeys(self.subject_of(each).class_word for each in self.images)))
        if image.subject is None and len(classes) > 1:
            raise HollowError(
                f"{image.where} is a picture of the class, but of which: {' or '.join(classes)}? Put it into a folder "
                f"named 1_{classes[0]}, or write a caption beside it."
            )
        own = image.subject or Subject("", classes[0] if classes else "")
        if not own.class_word:
            raise HollowError(
                f"{image.where}, a picture of the class, has no caption, and nothing says of which. Give a class word, "
                "such as dog, or write a caption beside it."
            )
        return self.generic_prompt(personal_prompt(*own))

    def check(self) -> None:
        """Refuse at once what would otherwise be refused after the long stages. Raises HollowError."""
        if not self.images:
            raise HollowError("There are no pictures to learn from. Give four or five of your subject.")
        if not self.name.strip(" .") or Path(self.name).name != self.name:
            raise HollowError(f"The LoRA cannot be called {self.name!r}. Give the name of a file, without folders.")
        if self.name.lower().endswith(".safetensors"):
            raise HollowError(f"The LoRA cannot be called {self.name!r}. Leave .safetensors out: it is added.")
        if f"{self.name}.safetensors".lower() == CHECKPOINT:
            raise HollowError(
                f"The LoRA cannot be called {self.name!r}: so is the state of the training. Give another."
            )
        if self.keep < 0:
            raise HollowError(f"{self.keep} files cannot be kept. Give 0 or more.")
        for image in (*self.images, *self.held_out):
            self.personal_prompt(image)
        for image in self.class_pictures:
            self.class_prompt(image)
        self._check_parts()
        recipe_for(None, *self.subject, "")
        asked = self.setting.resolution
        for image in (*self.images, *self.class_pictures, *self.held_out):
            if asked is not None and not 0.8 < math.prod(image.picture.size) / asked**2 < 1.25:
                raise HollowError(
                    f"{image.where} is {image.picture.width}×{image.picture.height} pixels, but the setting's "
                    f"resolution is {asked}. Load the pictures at that resolution, or leave it out."
                )
        optimizer_class(self.setting.training.optimizer)
        if self.setting.patches is not None:
            for image in (*self.images, *self.class_pictures, *self.held_out):
                check_patches(self.setting.patches, image.picture.size, 8)
        elif self.setting.training.strategy == "selective":
            low_factor(self)
        self.planned.check()

    def _check_parts(self) -> None:
        """Raises HollowError for a picture that is to play two parts, such as that of the subject and of the class."""
        parts = {"of the subject": self.images, "of the class": self.class_pictures, "held out": self.held_out}
        played: dict[str, str] = {}
        for part, images in parts.items():
            for path in {os.path.realpath(image.path) for image in images if image.path is not None}:
                if path in played:
                    raise HollowError(
                        f"{path} would be both {played[path]} and {part}. Give other pictures for one of them."
                    )
                played[path] = part

    @property
    def planned(self) -> Setting:
        """The setting with all that the pictures say."""
        return replace(
            self.setting, resolution=self.resolution, size=self.size, own_class_images=len(self.class_pictures)
        )


def check_heard(model: Model, request: Request) -> None:
    """Raises HollowError for a picture in whose caption the identifier is so far behind that no text encoder reads it:
    both prompts would be the same, and nothing of the subject could be learned."""
    for image in (*request.images, *request.held_out):
        personal = request.personal_prompt(image)
        generic = request.generic_prompt(personal)
        if personal != generic and model.tokens(personal) == model.tokens(generic):
            needed = chunks_lacking(model, personal)
            raise HollowError(
                f"The text encoder does not read as far as {request.subject_of(image).identifier!r} in the caption of "
                f"{image.where}, so nothing of the subject could be learned. Move it to the front"
                + (f", or take --prompt-chunks {needed}." if needed else ".")
            )


def make_examples(
    model: Model,
    request: Request,
    class_latents: Sequence[torch.Tensor],
    device: torch.device | str | None = None,
    stop: Stop | None = None,
) -> list[Example]:
    """The subject's pictures with their prompts, each as often as its captions change; those of the class, own ones
    before the drawn, with the generic one; those held out.

    VAE and text encoders visit `device` in turn; None leaves them where they are. `stop` is asked before each picture.
    Raises HollowError as `Request.check` does, and Stopped.
    """
    images, of_class, held_out = request.images, request.class_pictures, request.held_out
    with visiting(device, model.vae):
        encoded = encode_images(model, [*images, *of_class, *held_out], stop)
    latents = iter(encoded)
    examples = []
    with visiting(device, *model.text_encoders):
        encode = cache(partial(encode_prompt, model))

        def example(image: TrainingImage, z: torch.Tensor, personal: str, kind: Kind) -> Example:
            generic = request.generic_prompt(personal) if kind != "prior" else personal
            seen, base_sees = (told(encode(prompt), image.time_ids) for prompt in (personal, generic))
            mask = latent_mask(image, z)
            return Example(z, seen, base_sees, personal, generic, kind, image.repeats, mask)

        for (image, captions), z in zip(_captioned(request), latents, strict=False):
            examples += [example(image, z, caption, "image") for caption in captions]
        examples += [example(i, z, request.class_prompt(i), "prior") for i, z in zip(of_class, latents, strict=False)]
        for z, (prompt, size) in zip(class_latents, request.drawn, strict=True):
            seen = encode_prompt(model, prompt, size)
            examples.append(Example(z, seen, seen, prompt, prompt, "prior"))
        examples += [
            example(i, z, request.personal_prompt(i), "held-out image") for i, z in zip(held_out, latents, strict=True)
        ]
    return examples


def _captioned(request: Request) -> Iterator[tuple[TrainingImage, list[str]]]:
    """Each picture with the captions under which it is learned: one, or one for each of its records."""
    generator = torch.Generator().manual_seed(request.setting.training.seed)
    prior = bool(request.setting.class_images or request.class_pictures)
    samples = request.setting.samples - request.setting.samples // 2 * prior
    shares = sum(image.repeats for image in request.images)
    for image in request.images:
        records = -(-samples * image.repeats // shares) if request.captions.any else 1
        yield image, list(islice(request.captions.of(request.personal_prompt(image), generator), records))


def low_examples(
    model: Model,
    request: Request,
    examples: Sequence[Example],
    class_latents: Sequence[torch.Tensor],
    device: torch.device | str | None = None,
    stop: Stop | None = None,
) -> list[Example]:
    """The twins of `examples`, of `make_examples`, at the lower resolution, whose size SDXL is told; drawn class
    pictures are decoded.

    `stop` is asked before each picture. Raises HollowError as `low_factor` does, and Stopped.
    """
    factor = low_factor(request)
    learned = [example for example in examples if example.kind in LOW]
    with visiting(device, model.vae):
        whole = _pictures(model, request, learned, class_latents)
        small = {shown: smaller(image, factor) for shown, image in whole.items()}
        encoded = dict(zip(small, encode_images(model, list(small.values()), stop), strict=True))
    return [
        replace(_of(example, small[id(example.latents)], encoded[id(example.latents)]), kind=LOW[example.kind])
        for example in learned
    ]


def patch_examples(
    model: Model,
    request: Request,
    examples: Sequence[Example],
    records: Sequence[Record],
    class_latents: Sequence[torch.Tensor],
    device: torch.device | str | None = None,
    noise: Callable[[Record], float] | None = None,
    stop: Stop | None = None,
) -> tuple[list[Example], list[Record]]:
    """An example of its own for each of `records`, which `plan_for` has planned for `examples`, and the records of
    these: of a crop that is the larger the more noise there is, resized to the setting's patches. Where it is, the
    record's seed decides.

    By the strategy selective the crops are twins of the whole pictures; else they are in their place, held-out ones,
    too. `noise` says how much there is, from 0 to 1; None: as much as at the record's time step. `stop` is asked before
    each crop. Raises HollowError as `check_patches` does, and Stopped.
    """
    side, token = request.setting.patches, model.network.token_side
    assert side is not None
    grid = model.pixels_per_latent * (token or 1)
    schedule = model.schedule
    noise_of = noise or (lambda record: schedule.noise(record.timestep))
    selective = request.setting.training.strategy == "selective"
    cropped = [record for record in records if record.kind in LOW] if selective else records
    with visiting(device, model.vae):
        whole = _pictures(model, request, examples, class_latents)
        crops = []
        for record in cropped:
            image = whole[id(examples[record.image].latents)]
            check_patches(side, image.picture.size, grid)
            generator = torch.Generator().manual_seed(2**32 - 1 - record.noise_seed)  # the noise has its own
            crops.append(patch(image, noise_of(record), side, grid, generator))
        encoded = encode_images(model, [image for image, _ in crops], stop)
    made = []
    for record, (image, place), z in zip(cropped, crops, encoded, strict=True):
        example = _of(examples[record.image], image, z)
        if token is not None:
            example = replace(example, personal=placed(example.personal, place), generic=placed(example.generic, place))
        made.append(example)
    if selective:
        made = [*(examples[record.image] for record in records), *(replace(e, kind=LOW[e.kind]) for e in made)]
        records = [*records, *(record._replace(kind=LOW[record.kind]) for record in cropped)]
    return made, [record._replace(image=number) for number, record in enumerate(records)]


LOW: Mapping[Kind, Kind] = {"image": "low image", "prior": "low prior"}
"""What twins are."""


def _pictures(
    model: Model, request: Request, examples: Sequence[Example], class_latents: Sequence[torch.Tensor]
) -> dict[int, TrainingImage]:
    """The picture of each tensor of latents, by its id, of examples of `make_examples`; drawn ones are decoded."""
    drawn = [TrainingImage(picture, None, "", (0, 0, *picture.size)) for picture in decode_images(model, class_latents)]
    shown = dict.fromkeys(id(example.latents) for example in examples)
    return dict(zip(shown, (*request.images, *request.class_pictures, *drawn, *request.held_out), strict=False))


def _of(example: Example, image: TrainingImage, z: torch.Tensor) -> Example:
    """The example with another size or part of its picture."""
    return replace(
        example,
        latents=z,
        personal=told(example.personal, image.time_ids),
        generic=told(example.generic, image.time_ids),
        mask=latent_mask(image, z),
    )


def low_factor(request: Request) -> float:
    """How much smaller the pictures for BP-low are. Raises HollowError where they are not smaller than the others, or
    their resolution is no multiple of 8."""
    full = request.resolution
    side = request.setting.low_side(full)
    check_resolution(side)
    if side >= full:
        raise HollowError(f"The low resolution {side} is not below the pictures' {full}. Take half of it.")
    return side / full
