"""The six held-out subjects of the embedded model, drawn in new scenes and scored: what all benchmarks share."""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image
from torch import get_num_threads

from hollow_core.data.images import TrainingImage, load_images
from hollow_core.demo import run, scorers, world
from hollow_core.errors import HollowError
from hollow_core.files import read_json, write_json
from hollow_core.lora.file import LoraFile
from hollow_core.models.base_model import BaseModel
from hollow_core.sampling.sample import SampleSettings
from hollow_core.training.precompute import model_id

SEEDS_A_SCENE = 3
SCENES = [scene for scene in world.NEW_SCENES for _ in range(SEEDS_A_SCENE)]
SAMPLING = replace(run.SAMPLING, together=len(SCENES))


def references(folder: Path, subject: world.Subject) -> list[TrainingImage]:
    """The subject's five captioned pictures, by way of `folder`."""
    run.write_references(folder, subject)
    return load_images(folder, world.SIZE)


def keep_alike(out: Path, settings: dict[str, Any]) -> None:
    """All rows of a folder are made with the same settings, the demo's and these, by the same embedded model. Raises
    HollowError where those there have others."""
    demo = {"training": asdict(run.SETTINGS), "sampling": asdict(SAMPLING), "class pictures": run.CLASS_IMAGES}
    settings = json.loads(json.dumps({**settings, **demo, "model": model_id(run.model().network)}))
    begun: dict[str, Any] = kept(out / "settings.json", lambda: settings | {"made with": _environment()})
    other = [name for name in settings if begun.get(name) != settings[name]]
    if other:
        raise HollowError(f"{out} was begun with other settings ({', '.join(other)}). Choose another folder.")


def _environment() -> str:
    """What figures were begun with; in another they are others, as rounding is."""
    versions = [f"{name} {version(name)}" for name in ("torch", "diffusers", "peft", "transformers")]
    python, machine = f"Python {platform.python_version()}", f"{platform.machine()}, {get_num_threads()} thread(s)"
    return ", ".join([*versions, python, machine])


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` makes, JSON-ready; read back from `path` where it was made before."""
    if not path.exists():
        write_json(path, make())
    return read_json(path)


def scores(
    base: BaseModel,
    subject: world.Subject,
    lora: LoraFile | None,
    sampling: SampleSettings = SAMPLING,
    *,
    single_path: bool = False,
    noun: str | None = None,
) -> dict[str, float]:
    """Of pictures in four new scenes with three seeds each: how much the embedded scorers see of the subject
    ("subject") and of the scenes ("scene"), and the reader of its class, whatever its colours ("structure").

    `noun` is what prompts call it, if not by its identifier.
    """
    drawn = run.draw(base, noun or run.called(subject), SCENES, sampling, lora=lora, single_path=single_path)
    return judged(drawn, subject)


def judged(drawn: Sequence[Image.Image], subject: world.Subject) -> dict[str, float]:
    """The scores of pictures of `SCENES`."""
    subject_score, scene_score = run.score(drawn, subject, SCENES)
    structure = scorers.load().class_score(drawn, [subject.kind] * len(drawn))
    return {"subject": round(subject_score, 4), "scene": round(scene_score, 4), "structure": round(structure, 4)}
