"""The held-out subjects of the embedded model, drawn in new scenes and scored: what all benchmarks share."""

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor, get_num_threads

from benchmarks.independent import likeness
from hollow_core.data.images import TrainingImage, load_images
from hollow_core.demo import run, scorers, world
from hollow_core.errors import HollowError
from hollow_core.files import read_json, write_json
from hollow_core.lora import file as lora_file
from hollow_core.lora.file import LoraFile
from hollow_core.lora.metadata import recipe_for
from hollow_core.models.base_model import BaseModel
from hollow_core.nets.network import at_cut
from hollow_core.request import Request, make_examples, patch_examples
from hollow_core.sampling.prior import class_latents
from hollow_core.sampling.sample import SampleSettings
from hollow_core.training.precompute import model_id, plan_for, precompute
from hollow_core.training.store import Record, Store
from hollow_core.training.train import TrainResult, train

SUBJECTS = (*world.HELD_OUT, *world.CHOSEN_ON)
"""Those who judge, and behind them those on whom settings are chosen."""
WIDER = range(6)
"""Of the wider tables, which would take too long on all."""
STEPS = run.SETTINGS.steps // 2
"""Of a training: half of the demo's, so that many are done in hours."""
SEEDS_A_SCENE = 3
SCENES = [scene for scene in world.NEW_SCENES for _ in range(SEEDS_A_SCENE)]
AT_ONCE = len(SCENES)
"""Records that are made, and pictures that are drawn."""
SAMPLING = replace(run.SAMPLING, steps=20, together=AT_ONCE)


def references(folder: Path, subject: world.Subject, side: int = world.SIZE) -> list[TrainingImage]:
    """The subject's five captioned pictures, `side` pixels large, by way of `folder`."""
    run.write_references(folder, subject)
    return load_images(folder, side, square=True)


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
    ("subject") and of the scenes ("scene"), and the reader of its class, whatever its colours ("structure"); and what
    the world itself knows of its looks ("colour", "shape").

    `noun` is what prompts call it, if not by its identifier.
    """
    drawn = run.draw(base, noun or run.called(subject), SCENES, sampling, lora=lora, single_path=single_path)
    return judged(drawn, subject)


class Learned(NamedTuple):
    """What a training came to."""

    file: Path
    store: Store
    result: TrainResult
    seconds: float
    """Of its steps."""


def learn(
    request: Request,
    folder: Path,
    class_folder: Path,
    noise: Callable[[Record], float] | None = None,
    saved: Callable[[int, dict[str, Tensor]], object] | None = None,
) -> Learned:
    """A training of the embedded model into `folder`; drawn class pictures are shared by way of `class_folder`. With
    patches, `noise` says how much there is for them, from 0 to 1: see `patch_examples`; `saved` is as for `train`."""
    request.check()
    base, setting = run.model(), request.setting
    settings = setting.training
    made_by = model_id(base.network)
    drawn = class_latents(base, request.drawn, class_folder, made_by=made_by, together=AT_ONCE)
    examples = make_examples(base, request, drawn)
    records = plan_for(examples, setting.samples, base.schedule, settings.seed)
    if setting.patches is not None:
        examples, records = patch_examples(base, request, examples, records, drawn, noise=noise)
    store = precompute(
        base.network,
        base.schedule,
        examples,
        folder / "store",
        cut=setting.cut,
        samples=setting.samples,
        seed=settings.seed,
        together=AT_ONCE,
        records=records,
    )
    network = at_cut(base.network, setting.cut, {record.timestep for record in records})
    started = time.monotonic()
    result = train(network, base.schedule, store, settings, folder=folder, saved=saved)
    seconds = time.monotonic() - started
    recipe = recipe_for(setting.cut, *request.subject, base.schedule.prediction.name)
    file = folder / run.LORA_FILE
    config = base.network.config
    lora_file.save(file, result.state, config, alpha=settings.lora_alpha, layout=base.layout, recipe=recipe)
    return Learned(file, store, result, seconds)


def judged(drawn: Sequence[Image.Image], subject: world.Subject) -> dict[str, float]:
    """The scores of pictures of `SCENES`."""
    subject_score, scene_score = run.score(drawn, subject, SCENES)
    structure = scorers.load().class_score(drawn, [subject.kind] * len(drawn))
    return {
        "subject": round(subject_score, 4),
        "scene": round(scene_score, 4),
        "structure": round(structure, 4),
        **{name: round(value, 4) for name, value in likeness(drawn, subject)._asdict().items()},
    }
