"""A person's pictures as they lie on the disk: one folder, or kohya's, whose names say how often, whom and what."""

import os
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from ..errors import HollowError
from .caption_files import Captions
from .images import TrainingImage, load_image, no_pictures, not_read, picture_paths
from .prompts import Subject

IMAGE_FOLDERS = ("img", "image", "images")  # below a project's, as kohya's own interface lays it out
CLASS_FOLDERS = ("reg", "class")
_NAMED = re.compile(r"(\d+)_\s*(\S+)\s*(.*)")  # how often, the identifier, the class


class Pictures(NamedTuple):
    """What was found."""

    images: list[TrainingImage]
    """Of the subjects."""
    of_class: list[TrainingImage]
    """Of their classes."""
    passed_over: list[Path]
    """Folders below that are named otherwise, into which nobody looked."""
    not_read: list[Path]
    """Files beside the pictures that are neither pictures nor their captions."""


class Bucket(NamedTuple):
    """Pictures of one size."""

    size: tuple[int, int]
    """Width and height in pixels."""
    images: list[TrainingImage]

    @property
    def cropped(self) -> float:
        """The share that is cut off of the picture that loses most, from 0 to 1."""
        return max(image.cropped for image in self.images)

    @property
    def enlarged(self) -> float:
        """How many times larger than it was the one that gains most is; below 1 where all shrink."""
        return max(image.enlarged for image in self.images)


def load_pictures(
    folder: Path,
    resolution: int,
    *,
    class_folder: Path | None = None,
    square: bool = False,
    alpha_mask: bool = False,
) -> Pictures:
    """The pictures in `folder` and, as kohya's trainer has them, in folders in it that are named `10_sks dog`.

    The number says how often their pictures are repeated, the first word is the identifier, the others are the class; a
    single word is the identifier. Where `folder` has no pictures itself but a folder img or images, that is meant, and
    reg or class in either holds pictures of the class, as `class_folder` does. There, `1_dog` names the class. Raises
    HollowError as `load_images` does.
    """

    told: set[Path] = set()
    unread: list[Path] = []

    def load(place: Path, within: Path, subject: Subject | None, repeats: int) -> list[TrainingImage]:
        captions = Captions(place, within)
        loaded = [load_image(path, resolution, square, alpha_mask, captions) for path in picture_paths(place)]
        told.update(captions.read)
        unread.extend(not_read(place))
        return [image._replace(subject=subject, repeats=repeats) for image in loaded]

    inner = _called(folder, IMAGE_FOLDERS) if not picture_paths(folder) else []
    root = inner[0] if inner else folder
    class_roots = [*_called(folder, CLASS_FOLDERS), *(_called(root, CLASS_FOLDERS) if inner else [])]
    if class_folder is not None:
        class_roots = [class_folder]
    images, of_class, passed_over = [], [], inner[1:]
    for place, subject, repeats in _sources(root, passed_over):
        images += load(place, root, subject, repeats)
    for class_root in class_roots:
        for place, words, repeats in _sources(class_root, passed_over):
            subject = words and Subject("", f"{words.identifier} {words.class_word}".strip())
            of_class += load(place, class_root, subject, repeats)
    named_so = ", or name such a folder as 10_sks dog"
    if not images:
        raise no_pictures(root, "Put four or five of your subject there, .png or .jpg", named_so)
    if class_roots and not of_class:
        raise no_pictures(class_roots[0], "Put some of the class there, or remove it", named_so)
    return Pictures(images, of_class, passed_over, [file for file in unread if file not in told])


def check_outside(out: Path, *places: Path) -> None:
    """Raises HollowError where a picture that is written into `out` would be one of those of the `places` from then on:
    where it is one of them, or a folder in it that `load_pictures` looks into by its name."""
    names: list[str] = []
    whole, there = Path(os.path.realpath(out)), [place for place in places if place.exists()]
    for each in (whole, *whole.parents):
        if all(map(_is_source, names)) and each.exists() and any(map(each.samefile, there)):
            raise HollowError(
                f"{out} is a folder of your pictures, and what is drawn there would be taken for one of them the next "
                f"time. Choose another folder, such as {each.with_name(each.name + '-out')}."
            )
        names.append(each.name)


def _is_source(name: str) -> bool:
    """Whether a folder of this name may be looked into."""
    return name.lower() in (*IMAGE_FOLDERS, *CLASS_FOLDERS) or _NAMED.fullmatch(name) is not None


def _called(folder: Path, names: Sequence[str]) -> list[Path]:
    """The folders in `folder` that have one of these names, in any case."""
    return [each for each in sorted(folder.iterdir()) if each.is_dir() and each.name.lower() in names]


def _sources(folder: Path, passed_over: list[Path]) -> Iterator[tuple[Path, Subject | None, int]]:
    """`folder` itself, then those in it that are named as kohya's, each with whom it shows and how often."""
    yield folder, None, 1
    for place in sorted(folder.iterdir()):
        if not place.is_dir() or place.name.startswith(".") or place.name.lower() in CLASS_FOLDERS:
            continue
        if (match := _NAMED.fullmatch(place.name)) is None:
            passed_over.append(place)
        elif repeats := int(match[1]):
            yield place, Subject(match[2], match[3].strip()), repeats


def buckets(images: Sequence[TrainingImage]) -> list[Bucket]:
    """The sizes of pictures, from the widest to the highest, with those that have each."""

    def size(image: TrainingImage) -> tuple[int, int]:
        return image.picture.size

    by_size = sorted(images, key=lambda image: (-image.picture.width / image.picture.height, size(image)))
    return [Bucket(each, list(alike)) for each, alike in groupby(by_size, size)]
