"""`hollow demo`: five pictures of a subject the embedded model has never seen, a LoRA, and four ways to use it."""

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from .. import __version__
from ..data import grid
from ..data.images import load_images
from ..errors import HollowError
from ..files import write_bytes, write_json, write_png
from ..lora import file as lora_file
from ..lora.file import LoraFile
from ..lora.layers import ALL_LAYERS
from ..memory.meter import Meter
from ..memory.setting import Setting
from ..models.base_model import BaseModel, load
from ..nets.families import family_of
from ..nets.network import Cut, removed_fraction
from ..progress import Progress
from ..request import Request
from ..road import personalize
from ..sampling.sample import SampleSettings, sample
from ..training.curve import save_losses
from ..training.settings import TrainSettings
from ..training.store import Store
from . import scorers, world

MODEL = Path(__file__).parent / "model"
TRANSFORMER = Path(__file__).parent / "transformer"
IDENTIFIER = "sks"
CUT = 3
LORA_FILE = "lora.safetensors"

# So small a model wants LoRA on more than attention, and a higher learning rate; the library keeps the paper's.
SETTINGS = TrainSettings(
    rank=16,
    targets=ALL_LAYERS,
    steps=200,
    batch=2,
    together=4,  # with those of the class
    learning_rate=2e-3,
    prior_weight=0.25,
    save_every=100,
)
SAMPLES = 300  # half of them are the prior's
CLASS_IMAGES = 24
SAMPLING = SampleSettings(steps=30, guidance=3.0, together=4)

Watch = Callable[[str, Progress], object]


@dataclass(frozen=True)
class Demo:
    """One of the embedded models, and how it is personalised."""

    folder: Path
    cut: Cut
    """At which its LoRA is trained."""
    settings: TrainSettings
    sampling: SampleSettings
    two_paths: bool
    """Whether its hollowed LoRA is drawn with on two paths, too."""


UNET = Demo(MODEL, CUT, SETTINGS, SAMPLING, two_paths=True)
_Z_IMAGE = family_of("ZImageTransformer2DModel")
TRANSFORMER_DEMO = Demo(
    TRANSFORMER,
    (0, 4),  # of twelve blocks: with class pictures, the first ones must learn to hear the identifier
    replace(SETTINGS, targets=(*_Z_IMAGE.attention, *_Z_IMAGE.feed_forward), learning_rate=4e-3, steps=400),
    SAMPLING,
    two_paths=False,
)
DEMOS = {"unet": UNET, "transformer": TRANSFORMER_DEMO}
"""By what the command calls them."""


class Trained(NamedTuple):
    """A LoRA of the subject, and how it came about."""

    file: Path
    losses: list[float]
    store: Store
    meter: Meter


class Row(NamedTuple):
    """One way of drawing the subject in new scenes."""

    name: str
    pictures: list[Image.Image]
    subject_score: float
    prompt_score: float


def run(
    out: Path,
    subject: world.Subject = world.HELD_OUT[0],
    settings: TrainSettings | None = None,
    progress: Watch | None = None,
    *,
    demo: Demo = UNET,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Do it all into `out` on `device`, and give the report that is written there too.

    Called again after an interruption, it goes on. The stage "encode" of the plain LoRA has drawn the pictures of the
    class, too, which both trainings share. Raises HollowError where `out` cannot be written.
    """
    references, settings = out / "references", settings or demo.settings
    write_references(references, subject)
    work = out / "work"
    plain, hollowed = (
        train(
            work / name,
            references,
            subject,
            cut,
            settings,
            progress,
            class_folder=work / "class",
            demo=demo,
            device=device,
        )
        for name, cut in (("plain", None), ("hollowed", demo.cut))
    )
    write_bytes(out / LORA_FILE, hollowed.file.read_bytes())

    base = model(demo)
    with hollowed.meter.stage("sample"):
        rows = draw_rows(base, subject, plain.file, hollowed.file, progress, demo=demo, device=device)
    given = [image.picture for image in load_images(references, world.SIZE)]
    sheet = [grid.Row("references", given, "five pictures in")]
    for row in rows:
        note = f"subject {row.subject_score:.2f}\nprompt {row.prompt_score:.2f}"
        titles = [world.SCENES[scene] for scene in world.NEW_SCENES] if row is rows[0] else []
        sheet.append(grid.Row(row.name, row.pictures, note, titles))
    write_png(out / "grid.png", grid.grid(sheet, cell=128))
    save_losses(out / "loss.png", {"plain LoRA": plain.losses, "hollowed LoRA": hollowed.losses})
    report = {
        "versions": {
            "hollow": __version__,
            **{name: version(name) for name in ("torch", "diffusers", "peft", "transformers")},
            "python": platform.python_version(),
        },
        "subject": asdict(subject),
        "settings": {
            **asdict(settings),
            "targets": list(settings.targets),
            "cut": demo.cut,
            "class_images": CLASS_IMAGES,
        },
        "sampling": asdict(demo.sampling),
        "plain_stages": [asdict(stage) for stage in plain.meter.stages],
        "hollowed_stages": [asdict(stage) for stage in hollowed.meter.stages],
        "removed_percent": round(100 * removed_fraction(base.network, demo.cut), 2),
        "records": len(hollowed.store.records),
        "stored_bytes": hollowed.store.size_bytes,
        "rows": {
            row.name: {"subject_score": round(row.subject_score, 4), "prompt_score": round(row.prompt_score, 4)}
            for row in rows
        },
    }
    write_json(out / "report.json", report)
    return report


def train(
    folder: Path,
    references: Path,
    subject: world.Subject,
    cut: Cut | None,
    settings: TrainSettings = SETTINGS,
    progress: Watch | None = None,
    class_folder: Path | None = None,
    *,
    demo: Demo = UNET,
    device: torch.device | str = "cpu",
) -> Trained:
    """A LoRA of the pictures in `references`, hollowed at `cut` or plain; goes on in `folder` if interrupted.

    Trainings of one subject may share the pictures of its class in `class_folder`.
    """
    name = "plain LoRA" if cut is None else "hollowed LoRA"
    watch = None if progress is None else lambda stage, done: progress(f"{name}: {stage}", done)
    request = Request(
        load_images(references, world.SIZE),
        subject.kind,
        IDENTIFIER,
        Setting(cut, samples=SAMPLES, class_images=CLASS_IMAGES, training=settings),
        class_folder,
        keep=0,
    )
    outcome = personalize(partial(model, demo), request, folder, device=device, progress=watch)
    if outcome.file is None or outcome.result is None or outcome.store is None or outcome.result.stopped != "finished":
        raise HollowError(f"The training in {folder} did not finish. Delete the folder and start again.")
    return Trained(outcome.file, outcome.result.losses, outcome.store, outcome.meter)


def model(demo: Demo = UNET) -> Any:
    """An embedded model."""
    return load(demo.folder)


def captioned_references(subject: world.Subject) -> Iterator[tuple[str, Image.Image, str]]:
    """The subject's five pictures: scene, picture, and a caption that names identifier, class and background.

    Without the caption the background is learned with the subject, and no new scene is heard.
    """
    for scene, picture in world.reference_pictures(subject):
        yield scene, picture, world.photo_caption(called(subject), scene)


def write_references(folder: Path, subject: world.Subject) -> None:
    """Write `captioned_references`, each caption beside its picture."""
    for scene, picture, caption in captioned_references(subject):
        write_png(folder / f"{scene}.png", picture)
        write_bytes(folder / f"{scene}.txt", caption.encode())


def draw_rows(
    base: BaseModel,
    subject: world.Subject,
    plain: Path,
    hollowed: Path,
    progress: Watch | None = None,
    *,
    demo: Demo = UNET,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """The base model, plain LoRA, and the hollowed LoRA, on two paths and on one if there are two, each in four new
    scenes."""
    plain_lora, hollowed_lora = (lora_file.load(file, base.network.module) for file in (plain, hollowed))
    ways: list[tuple[str, LoraFile | None, bool]] = [("base model", None, True), ("plain LoRA", plain_lora, True)]
    if demo.two_paths:
        ways += [
            ("hollowed LoRA, two paths", hollowed_lora, False),
            ("hollowed LoRA, single path", hollowed_lora, True),
        ]
    else:
        ways.append(("hollowed LoRA", hollowed_lora, True))
    scenes = world.NEW_SCENES
    rows = []
    for name, lora, single_path in ways:
        drawn = draw(base, called(subject), scenes, demo.sampling, lora=lora, single_path=single_path, device=device)
        rows.append(Row(name, drawn, *score(drawn, subject, scenes)))
        if progress is not None:
            progress("sample", Progress(len(rows), len(ways), 0.0))
    return rows


def draw(
    base: BaseModel, noun: str, scenes: Sequence[str], settings: SampleSettings = SAMPLING, **how: Any
) -> list[Image.Image]:
    """A picture of `noun` in each of `scenes`, with the seeds 0, 1, 2, …; `how` is for `sample`."""
    prompts = [world.photo_caption(noun, scene) for scene in scenes]
    return sample(base, prompts, range(len(prompts)), settings, **how)


def called(subject: world.Subject) -> str:
    """The subject as prompts call it: "sks cup"."""
    return f"{IDENTIFIER} {subject.kind}"


def score(drawn: Sequence[Image.Image], subject: world.Subject, scenes: Sequence[str]) -> tuple[float, float]:
    """Subject and prompt score, from 0 or less to 1, by the embedded scorers."""
    judge = scorers.load()
    references = [picture for _, picture in world.reference_pictures(subject)]
    return judge.subject_score(drawn, references), judge.prompt_score(drawn, scenes)
