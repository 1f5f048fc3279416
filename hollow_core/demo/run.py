"""`hollow demo`: five pictures of a subject the embedded model has never seen, a LoRA, and four ways to use it."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from .. import lora_file
from ..blocks import removed_fraction
from ..files import write_bytes, write_json
from ..images import load_images
from ..lora_file import LoraFile
from ..models import BaseModel, load
from ..personalize import LORA_FILE, Outcome, Request, personalize
from ..progress import Progress, Stop
from ..sample import SampleSettings, sample
from ..train import TrainSettings
from . import pictures, scorers, world

MODEL = Path(__file__).parent / "model"
IDENTIFIER = "sks"
CUT = 3
SEEDS = (0, 1, 2, 3)

# So small a model wants LoRA on more than attention, and a higher learning rate; the library keeps the paper's.
SETTINGS = TrainSettings(
    rank=16,
    targets=(
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "conv1",
        "conv2",
        "proj_in",
        "proj_out",
        "ff.net.0.proj",
        "ff.net.2",
    ),
    steps=400,
    batch=4,
    learning_rate=2e-3,
)
SAMPLING = SampleSettings(steps=30, guidance=3.0)

Watch = Callable[[str, Progress], object]


@dataclass(frozen=True)
class Row:
    """One way of drawing the subject in new scenes."""

    name: str
    pictures: list[Image.Image]
    subject_score: float
    prompt_score: float


def run(
    out: Path,
    subject: world.Subject = world.HELD_OUT[0],
    *,
    progress: Watch | None = None,
    stop: Stop | None = None,
) -> dict[str, Any] | None:
    """Do it all into `out`, and give the report that is written there too; None if `stop` ended it.

    Called again after an interruption, it goes on. Raises HollowError where `out` cannot be written.
    """
    write_references(out / "references", subject)
    outcomes: dict[str, Outcome] = {}
    for name, cut in (("plain LoRA", None), ("hollowed LoRA", CUT)):
        watch = None if progress is None else _named(progress, name)
        folder = out / "work" / ("plain" if cut is None else "hollowed")
        outcome = personalize(model, request(out / "references", subject, cut), folder, progress=watch, stop=stop)
        if outcome.result is None or outcome.result.stopped != "finished":
            return None
        outcomes[name] = outcome
    plain, hollowed = (outcomes[name] for name in ("plain LoRA", "hollowed LoRA"))
    assert hollowed.file is not None
    write_bytes(out / LORA_FILE, hollowed.file.read_bytes())

    base = model()
    with hollowed.meter.stage("sample"):
        rows = draw_rows(base, subject, plain, hollowed, progress)
    references = [image.picture for image in load_images(out / "references", world.SIZE)]
    captions = [world.SCENES[scene] for scene in world.NEW_SCENES]
    pictures.save_grid(out / "grid.png", references, {row.name: (row.pictures, _scores(row)) for row in rows}, captions)
    losses = {name: outcome.result.losses for name, outcome in outcomes.items() if outcome.result is not None}
    pictures.save_losses(out / "loss.png", losses)
    report = {
        "versions": {name: version(name) for name in ("hollow", "torch", "diffusers", "peft", "transformers")}
        | {"python": platform.python_version()},
        "subject": asdict(subject),
        "settings": {
            **asdict(SETTINGS),
            "cut": CUT,
            "samples": len(hollowed.store.records) if hollowed.store else 0,
        },
        "sampling": asdict(SAMPLING),
        "stages": {name: [asdict(stage) for stage in outcome.meter.stages] for name, outcome in outcomes.items()},
        "removed_percent": round(100 * removed_fraction(base.unet, CUT), 2),
        "records": len(hollowed.store.records) if hollowed.store else 0,
        "stored_bytes": hollowed.store.size_bytes if hollowed.store else 0,
        "rows": {
            row.name: {
                "subject_score": round(row.subject_score, 4),
                "prompt_score": round(row.prompt_score, 4),
            }
            for row in rows
        },
    }
    write_json(out / "report.json", report)
    return report


def model() -> BaseModel:
    """The embedded model."""
    return load(MODEL)


def request(references: Path, subject: world.Subject, cut: int | None, seed: int = 0) -> Request:
    """What the demo asks `personalize` for."""
    images = load_images(references, world.SIZE)
    return Request(images, subject.kind, IDENTIFIER, cut, settings=replace(SETTINGS, seed=seed))


def write_references(folder: Path, subject: world.Subject) -> None:
    """The subject's five pictures, each with a caption beside it that names its background.

    Without the caption the background is learned with the subject, and no new scene is heard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for scene, picture in world.reference_pictures(subject):
        picture.save(folder / f"{scene}.png")
        (folder / f"{scene}.txt").write_text(world.photo_caption(f"{IDENTIFIER} {subject.kind}", scene))


def draw_rows(
    base: BaseModel, subject: world.Subject, plain: Outcome, hollowed: Outcome, progress: Watch | None
) -> list[Row]:
    """The base model, plain LoRA, and the hollowed LoRA on two paths and on one, each in four new scenes."""
    assert plain.file is not None
    assert hollowed.file is not None
    ways: list[tuple[str, LoraFile | None, bool]] = [
        ("base model", None, True),
        ("plain LoRA", lora_file.load(plain.file, base.unet), True),
        ("hollowed LoRA, two paths", lora_file.load(hollowed.file, base.unet), False),
        ("hollowed LoRA, single path", lora_file.load(hollowed.file, base.unet), True),
    ]
    scenes = world.NEW_SCENES
    prompts = [world.photo_caption(f"{IDENTIFIER} {subject.kind}", scene) for scene in scenes]
    rows = []
    for name, lora, single_path in ways:
        drawn = sample(base, prompts, SEEDS, SAMPLING, lora=lora, single_path=single_path)
        rows.append(Row(name, drawn, *score(drawn, subject, scenes)))
        if progress is not None:
            progress("sample", Progress(len(rows), len(ways), 0.0))
    return rows


def score(drawn: Sequence[Image.Image], subject: world.Subject, scenes: Sequence[str]) -> tuple[float, float]:
    """Subject and prompt score, from 0 or less to 1, by the embedded scorers."""
    judge = scorers.load(MODEL)
    references = [picture for _, picture in world.reference_pictures(subject)]
    return judge.subject_score(drawn, references), judge.prompt_score(drawn, scenes)


def _named(progress: Watch, name: str) -> Watch:
    return lambda stage, done: progress(f"{name}: {stage}", done)


def _scores(row: Row) -> str:
    return f"subject {row.subject_score:.2f}\nprompt {row.prompt_score:.2f}"
