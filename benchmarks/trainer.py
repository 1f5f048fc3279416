"""What else a trainer has, on the embedded model: `python -m benchmarks.trainer --out DIR`.

Three tables, of trainings that are hollowed as the demo's where nothing else is said. "shapes": pictures of mixed
shape, in which the subject stands near an end, learned in buckets and as squares, and how well the base model knows
such shapes. "optimizers": every optimizer, schedule, EMA and DoRA against AdamW on the same records, each at its usual
learning rate times what this small model's AdamW has over AdamW's usual one. "style": pictures of several classes in
two colours, with ordinary captions and no identifier; whether pictures of other classes in other scenes have these
colours. `--only` makes one of them, `--quick` a small run. What is done is kept in DIR, so that a stopped run goes on.
Writes DIR/shapes.png and DIR/style.png, and prints the tables.
"""

import argparse
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from benchmarks import held_out
from benchmarks.paper.figures import Figure, plain, signed
from benchmarks.selective import loss
from hollow_core.data import grid
from hollow_core.data.images import TrainingImage, load_images
from hollow_core.data.picture_file import open_picture
from hollow_core.demo import run, scorers, world
from hollow_core.files import write_bytes, write_png
from hollow_core.lora import file as lora_file
from hollow_core.lora.file import LoraFile
from hollow_core.memory.setting import Setting
from hollow_core.request import Request, make_examples
from hollow_core.road import personalize
from hollow_core.sampling.sample import sample
from hollow_core.training.optimizer import USUAL_RATES, OptimizerName
from hollow_core.training.precompute import precompute
from hollow_core.training.settings import TrainSettings

SUBJECTS = (1, 2)  # the usual rates of Prodigy and schedule-free AdamW were chosen on 0
TOLERANCE = 0.02  # a score that is lower by no more is as good

SHAPES = ((96, 64), (64, 96), (112, 64), (64, 112), (64, 64))
"""Of the five references, width and height in pixels: what cameras and phones make, and a square."""

PAPER, INK = (250, 244, 222), (16, 40, 116)
"""The style's colours: of white and of black."""
STYLE_SETS = 3
STYLE_CLASSES = ("cup", "ball", "house", "car", "fish", "bird", "rocket")
"""Those of the style's pictures, each in two of the reference scenes."""
OTHER_CLASSES = ("cat", "dog", "robot", "boat")
"""Those that are drawn."""

Row = Mapping[str, float]


def main(arguments: Sequence[str] | None = None) -> None:
    parts = {"shapes": shapes, "optimizers": optimizers, "style": style}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hollow-trainer"), help="folder for the results")
    parser.add_argument("--only", choices=parts, help="which table (default all)")
    parser.add_argument("--quick", action="store_true", help="one subject and a few steps: whether it runs")
    options = parser.parse_args(arguments)
    options.training = replace(run.SETTINGS, steps=10) if options.quick else run.SETTINGS
    options.sampling = replace(held_out.SAMPLING, steps=2) if options.quick else held_out.SAMPLING
    options.subjects = SUBJECTS[:1] if options.quick else SUBJECTS
    options.samples, options.class_images = (20, 2) if options.quick else (run.SAMPLES, run.CLASS_IMAGES)
    held_out.keep_alike(options.out, {"quick": options.quick})
    for name in [options.only] if options.only else parts:
        parts[name](options)


# Buckets and squares


def shapes(options: argparse.Namespace) -> None:
    """Mixed pictures in buckets and as squares, and what the base model makes of such shapes."""
    square = [(world.SIZE, world.SIZE)] * len(SHAPES)
    names = {"squares": (SHAPES, True), "buckets": (SHAPES, False), "drawn as squares": (square, True)}

    def measure(number: int, name: str, folder: Path) -> Row:
        subject, (drawn, as_squares) = world.HELD_OUT[number], names[name]
        write_mixed(folder / "references", subject, drawn)
        images = load_images(folder / "references", world.SIZE, square=as_squares)
        of_class = folder.parent / f"class of {'squares' if as_squares else 'buckets'}"
        return _scores(options, subject, images, options.training, folder, of_class)

    _table(options, "shapes", list(names), measure)
    _shapes_sheet(options, options.out / "shapes" / f"subject-{options.subjects[0]}", list(names)[:2])
    losses = {number: _base_losses(options, number) for number in options.subjects}
    print("\n| pictures of | the base model's loss | over the square's |\n|---|---|---|")
    for size in losses[options.subjects[0]]:
        of_size = {(number, 0): row[size] for number, row in losses.items()}
        over = {(number, 0): row[size] - row["64×64"] for number, row in losses.items()}
        print(f"| {size} | {plain(Figure.of(of_size))} | {signed(Figure.of(over))} |", flush=True)


def _shapes_sheet(options: argparse.Namespace, folder: Path, names: Sequence[str]) -> None:
    """What the first subject was learned from, and what came of it."""
    subject, base = world.HELD_OUT[options.subjects[0]], run.model()
    sheet = []
    for name in names:
        images = load_images(folder / name / "references", world.SIZE, square=name == "squares")
        lora = lora_file.load(folder / name / run.LORA_FILE, base.unet)
        drawn = run.draw(base, run.called(subject), world.NEW_SCENES, options.sampling, lora=lora, single_path=True)
        sheet += [grid.Row(name, [image.picture for image in images], "learned"), grid.Row("", drawn, "drawn")]
    write_png(options.out / "shapes.png", grid.grid(sheet, cell=128))


def write_mixed(folder: Path, subject: world.Subject, shapes: Sequence[tuple[int, int]]) -> None:
    """The subject in each reference scene, in a picture of one of `shapes`, with its caption."""
    for scene, shape in zip(world.REFERENCE_SCENES, shapes, strict=True):
        picture = world.draw(subject, scene, random.Random(f"{subject} {scene}"), shape)
        write_png(folder / f"{scene}.png", picture)
        write_bytes(folder / f"{scene}.txt", world.photo_caption(run.called(subject), scene).encode())


def _base_losses(options: argparse.Namespace, number: int) -> dict[str, float]:
    """{size: loss} of the base model on pictures of the subject's class in the size of each bucket: always in the same
    scenes, at the same time steps."""
    subject, folder = world.HELD_OUT[number], options.out / "shapes" / f"subject-{number}" / "base"

    def measure() -> dict[str, float]:
        base, found = run.model(), {}
        for shape in sorted(SHAPES, key=lambda shape: -shape[0] / shape[1]):
            work = folder / "{}×{}".format(*shape)
            write_mixed(work / "references", subject, [shape] * len(SHAPES))
            images = load_images(work / "references", world.SIZE)
            images = [
                image._replace(caption=(image.caption or "").replace(f"{run.IDENTIFIER} ", "")) for image in images
            ]
            examples = make_examples(base, Request(images, identifier="", setting=Setting(None)), [])
            store = precompute(
                base.network, base.schedule, examples, work / "store", cut=None, samples=options.samples, made_by=""
            )
            found["{}×{}".format(*images[0].picture.size)] = round(loss(base, store, None), 4)
        return found

    row: dict[str, float] = held_out.kept(folder / "row.json", measure)
    return row


# Optimizers, schedules, averages, DoRA


def ways(training: TrainSettings) -> dict[str, TrainSettings]:
    """The trainings to compare, by name; the first is what the others are compared with."""
    usual = {name: training.rate * rate / USUAL_RATES["adamw"] for name, rate in USUAL_RATES.items()}
    usual["prodigy"] = USUAL_RATES["prodigy"]  # which is a factor of the rate that it finds
    names: dict[OptimizerName, str] = {
        "adamw": "AdamW",
        "adamw8bit": "AdamW in 8 bits",
        "prodigy": "Prodigy",
        "adafactor": "Adafactor",
        "lion": "Lion",
        "schedulefree": "schedule-free AdamW",
    }
    warm = replace(training, warmup=training.steps // 10)
    return {
        **{said: replace(training, optimizer=name, learning_rate=usual[name]) for name, said in names.items()},
        "AdamW, warm-up": warm,
        "AdamW, warm-up, linear": replace(warm, lr_schedule="linear"),
        "AdamW, warm-up, cosine": replace(warm, lr_schedule="cosine"),
        "AdamW, warm-up, cosine with restarts": replace(warm, lr_schedule="cosine_with_restarts"),
        "AdamW, warm-up, polynomial": replace(warm, lr_schedule="polynomial"),
        "AdamW, EMA .99": replace(training, ema=0.99),
        "AdamW, DoRA": replace(training, dora=True),
    }


def optimizers(options: argparse.Namespace) -> None:
    """Every way on the same records, which the first one makes."""
    trainings = ways(options.training)
    first = next(iter(trainings))

    def measure(number: int, name: str, folder: Path) -> Row:
        subject, store = world.HELD_OUT[number], folder.parent / first / "store"
        if store.exists() and not (folder / "store").exists():
            shutil.copytree(store, folder / "store")
        images = held_out.references(folder.parent / "references", subject)
        return _scores(options, subject, images, trainings[name], folder, folder.parent / "class")

    _table(options, "optimizers", list(trainings), measure, TOLERANCE)


# A style


def style(options: argparse.Namespace) -> None:
    """Learned with a hollow and without, and drawn."""
    rows: dict[str, list[Row]] = {}
    sheet: list[grid.Row] = []
    for number in range(1 if options.quick else STYLE_SETS):
        for name, drawn in _drawn_in_style(options, number):
            row = judged_style(drawn)
            rows.setdefault(name, []).append(row)
            if number == 0:
                titles = [] if sheet else [" ".join(asked) for asked in _asked()[:: held_out.SEEDS_A_SCENE]]
                note = f"distance {row['distance']:.0f}"
                sheet.append(grid.Row(name, drawn[:: held_out.SEEDS_A_SCENE], note, titles))
    print("\n| | distance from the colours | scene | class |\n|---|---|---|---|")
    for name, of_sets in rows.items():
        distance, *read = (Figure.of({(n, 0): row[what] for n, row in enumerate(of_sets)}) for what in of_sets[0])
        assert distance is not None
        print(f"| {name} | {distance.mean:.1f} ± {distance.spread:.1f} | {' | '.join(map(plain, read))} |", flush=True)
    learned = [image.picture for image in style_pictures(options.out / "style" / "set-0" / "references", 0)]
    sheet.insert(0, grid.Row("learned from", learned[:5], f"and {len(learned) - 5} more"))
    write_png(options.out / "style.png", grid.grid(sheet, cell=128))


def in_style(picture: Image.Image) -> Image.Image:
    """The picture in the style's two colours and what is between them."""
    return ImageOps.colorize(picture.convert("L"), INK, PAPER)


def style_pictures(folder: Path, number: int) -> list[TrainingImage]:
    """A set of pictures in the style, by way of `folder`: of two subjects of each class, with captions that say class
    and scene."""
    choose, scenes = random.Random(number), world.REFERENCE_SCENES
    for place, kind in enumerate(2 * STYLE_CLASSES):
        scene = scenes[place % len(scenes)]
        picture = world.draw(replace(world.random_subject(choose), kind=kind), scene, choose)
        write_png(folder / f"{place:02}.png", in_style(picture))
        write_bytes(folder / f"{place:02}.txt", world.photo_caption(kind, scene).encode())
    return load_images(folder, world.SIZE)


def judged_style(drawn: Sequence[Image.Image]) -> Row:
    """How far the pixels are from the line between the style's colours, on average, in steps of 255 a channel; and
    what the embedded reader sees of the scenes and classes that were asked for."""
    ink, line = np.array(INK), np.array(PAPER) - np.array(INK)
    pixels = np.stack([np.asarray(picture, dtype=np.float64) for picture in drawn]) - ink
    along = np.clip(pixels @ line / (line @ line), 0, 1)
    reader, asked = scorers.load(), _asked()
    return {
        "distance": float(np.linalg.norm(pixels - along[..., None] * line, axis=-1).mean()),
        "scene": reader.prompt_score(drawn, [scene for _, scene in asked]),
        "class": reader.class_score(drawn, [kind for kind, _ in asked]),
    }


def _asked() -> list[tuple[str, str]]:
    """Class and scene of each picture that is drawn."""
    return [(OTHER_CLASSES[n % len(OTHER_CLASSES)], scene) for n, scene in enumerate(held_out.SCENES)]


def _drawn_in_style(options: argparse.Namespace, number: int) -> Iterator[tuple[str, list[Image.Image]]]:
    """Each way's pictures, when a set was learned."""
    folder, prompts = options.out / "style" / f"set-{number}", [world.photo_caption(*asked) for asked in _asked()]

    def drawn(name: str, draw: Callable[[], list[Image.Image]]) -> tuple[str, list[Image.Image]]:
        paths = [folder / name / f"{place:02}.png" for place in range(len(prompts))]
        if not paths[-1].exists():
            for path, picture in zip(paths, draw(), strict=True):
                write_png(path, picture)
        return name, [open_picture(path) for path in paths]

    def by_world() -> list[Image.Image]:
        choose = random.Random(f"style {number}")
        return [world.draw(replace(world.random_subject(choose), kind=kind), scene, choose) for kind, scene in _asked()]

    def by_model(cut: int | None, learned: bool, **how: Any) -> list[Image.Image]:
        base, lora = run.model(), None
        if learned:
            images = style_pictures(folder / "references", number)
            setting = Setting(cut, samples=options.samples, training=replace(options.training, seed=number))
            lora = _learned(Request(images, identifier="", setting=setting, keep=0), folder / f"cut {cut}")
        seeds = range(number * len(prompts), (number + 1) * len(prompts))
        return sample(base, prompts, seeds, options.sampling, lora=lora, **how)

    yield drawn("drawn in the style", lambda: [in_style(picture) for picture in by_world()])
    yield drawn("base model", lambda: by_model(None, False))
    yield drawn("plain LoRA", lambda: by_model(None, True))
    yield drawn("hollowed LoRA, two paths", lambda: by_model(run.CUT, True))
    yield drawn("hollowed LoRA, single path", lambda: by_model(run.CUT, True, single_path=True))


# What all have


def _scores(
    options: argparse.Namespace,
    subject: world.Subject,
    images: Sequence[TrainingImage],
    training: TrainSettings,
    folder: Path,
    class_folder: Path,
) -> Row:
    """Of a training as the demo's is, on a single path, which is the shorter one, and as good at this cut."""
    setting = Setting(run.CUT, samples=options.samples, class_images=options.class_images, training=training)
    lora = _learned(Request(images, subject.kind, run.IDENTIFIER, setting, class_folder, keep=0), folder)
    return held_out.scores(run.model(), subject, lora, options.sampling, single_path=True)


def _learned(request: Request, folder: Path) -> LoraFile:
    """By the whole road."""
    outcome = personalize(run.model, request, folder)
    assert outcome.file is not None
    assert outcome.result is not None
    if outcome.result.stopped != "finished":
        print(f"{folder.name} ended with a {outcome.result.stopped} after {outcome.result.steps} steps", flush=True)
    return lora_file.load(outcome.file, run.model().unet)


def _table(
    options: argparse.Namespace,
    part: str,
    names: Sequence[str],
    measure: Callable[[int, str, Path], Row],
    tolerance: float | None = None,
) -> None:
    """Of each subject and way, measured where it was not; differences are to the first way. With a `tolerance`, whether
    a way is worse by no more."""
    rows: dict[str, dict[tuple[int, int], Row]] = {name: {} for name in names}
    for number in options.subjects:
        for name in names:
            folder, started = options.out / part / f"subject-{number}" / name, time.monotonic()
            is_new = not (folder / "row.json").exists()
            row = rows[name][number, 0] = held_out.kept(folder / "row.json", partial(measure, number, name, folder))
            if is_new:
                print(f"subject {number}, {name}: {row} {time.monotonic() - started:.0f} s", flush=True)
    columns = ["", "subject", f"over {names[0]}", "scene", *(["reached"] if tolerance is not None else [])]
    print(f"\n| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for name, of_way in rows.items():
        subject, scene = (Figure.of({key: row[what] for key, row in of_way.items()}) for what in ("subject", "scene"))
        over = Figure.of({key: row["subject"] - rows[names[0]][key]["subject"] for key, row in of_way.items()})
        assert over is not None
        cells = [name, plain(subject), signed(over), plain(scene)]
        if tolerance is not None:
            cells.append("yes" if over.mean >= -tolerance else "no")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
