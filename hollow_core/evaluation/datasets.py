"""The papers' two data sets as they are downloaded: subjects, their class words, and their prompts.

DreamBooth (arXiv 2208.12242), github.com/google/dreambooth: pictures in dataset/SUBJECT/, classes and prompts in
dataset/prompts_and_classes.txt, one list for objects and one for living subjects. CustomConcept101 (arXiv
2212.04488), github.com/adobe-research/custom-diffusion, folder customconcept101: subjects in dataset.json, which
names for each its pictures in benchmark_dataset/ (a download of its own) and its prompts in prompts/.

The prompts are read from there, word by word as they were published, and are not kept a second time here.
"""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from ..errors import HollowError
from ..files import read_json

Dataset = Literal["dreambooth", "customconcept101"]
LIVING = ("cat", "dog")  # "9 out of these subjects are live subjects (dogs and cats)", says DreamBooth's README
DREAMBOOTH_FILE = "prompts_and_classes.txt"


class Subject(NamedTuple):
    """One subject of a data set."""

    name: str
    class_word: str
    folder: Path
    """Of its pictures."""
    prompts: tuple[str, ...]
    """In each, {} stands for identifier and class word: "a {} in the jungle"."""


def load_subjects(dataset: Dataset, folder: Path, names: Sequence[str] = ()) -> list[Subject]:
    """All subjects of the data set in `folder`, in its order, or those of `names`.

    Raises HollowError where the data set's own list of prompts is missing or holds nothing, where a subject has no
    folder, and for a name that is not there.
    """
    subjects = _dreambooth(folder) if dataset == "dreambooth" else _customconcept101(folder)
    if unknown := sorted({*names} - {subject.name for subject in subjects}):
        known = ", ".join(subject.name for subject in subjects)
        raise HollowError(f"{folder} knows no subject {unknown[0]!r}. Choose from {known}.")
    subjects = [subject for subject in subjects if not names or subject.name in names]
    for subject in subjects:
        if not subject.folder.is_dir():
            raise HollowError(f"The pictures of {subject.name} are not in {subject.folder}. Download them, too.")
        if not subject.prompts:
            raise HollowError(f"There are no prompts for {subject.name} in {folder}. Download the data set again.")
    return subjects


def _dreambooth(folder: Path) -> list[Subject]:
    places = [place for place in (folder / "dataset", folder) if (place / DREAMBOOTH_FILE).exists()]
    if not places:
        raise HollowError(
            f"There is no {DREAMBOOTH_FILE} in {folder} or {folder / 'dataset'}. Give the folder of a clone of "
            "https://github.com/google/dreambooth."
        )
    text = (places[0] / DREAMBOOTH_FILE).read_text(encoding="utf-8")
    classes, _, prompts = text.partition("Object Prompts")
    objects, _, living = prompts.partition("Live Subject Prompts")
    templates = {kind: tuple(_templates(part)) for kind, part in (("object", objects), ("living", living))}
    pairs = [line.split(",") for line in classes.splitlines() if line.count(",") == 1]
    return [
        Subject(name, word, places[0] / name, templates["living" if word in LIVING else "object"])
        for name, word in ((name.strip(), word.strip()) for name, word in pairs)
        if name != "subject_name"
    ]


def _templates(part: str) -> list[str]:
    """Of lines that read 'a {0} {1} in the jungle'.format(unique_token, class_token)."""
    lines = re.findall(r"""^\s*(['"])(.+)\1\.format\(""", part, re.MULTILINE)
    return [line.replace("{0} {1}", "{}") for _, line in lines]


def _customconcept101(folder: Path) -> list[Subject]:
    places = [place for place in (folder / "customconcept101", folder) if (place / "dataset.json").exists()]
    if not places:
        raise HollowError(
            f"There is no dataset.json in {folder} or {folder / 'customconcept101'}. Give the folder of a clone of "
            "https://github.com/adobe-research/custom-diffusion, with the pictures in customconcept101."
        )
    return [_concept(places[0], entry) for entry in read_json(places[0] / "dataset.json")]


def _concept(place: Path, entry: dict[str, str]) -> Subject:
    pictures, prompts = (place / PurePosixPath(entry[key]) for key in ("instance_data_dir", "prompt_filename"))
    try:
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise HollowError(f"{prompts} cannot be read ({error.strerror}). Download the data set again.") from error
    return Subject(pictures.name, entry["class_prompt"], pictures, tuple(line for line in lines if line))
