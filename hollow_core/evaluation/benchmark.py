"""The paper's protocol: every subject learned by every method, drawn under every prompt, and scored (Sec. 5.1).

A job is one method, one training seed and one subject. It leaves its LoRA, its pictures and its scores, and may be
interrupted anywhere: what is there is not made again. Jobs share nothing but pictures of their class, so processes
that take different classes never meet.
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch

from ..data.images import load_images, picture_paths
from ..data.picture_file import open_picture
from ..errors import HollowError
from ..files import read_json, write_bytes, write_json, write_png
from ..lora import file as lora_file
from ..memory.planner import Planner
from ..memory.setting import Setting
from ..models.base_model import BaseModel, visiting
from ..progress import Progress, Stop
from ..request import Request
from ..road import personalize
from ..sampling.sample import SampleSettings, encode, portions
from ..training.settings import TrainSettings
from .datasets import Subject
from .scores import Score, Scorers, mean, score


class Method(NamedTuple):
    """A row of the table: "lora-r128" on the whole U-Net, "hollowed-k3-r128" at a cut."""

    name: str
    cut: int | None
    rank: int

    @classmethod
    def parse(cls, name: str) -> "Method":
        """From its name. Raises HollowError for any other."""
        match = re.fullmatch(r"(?:lora|hollowed-k(\d+))-r([1-9]\d*)", name)
        if match is None:
            raise HollowError(f"There is no method {name!r}. Write lora-r128, or hollowed-k3-r128 for the cut 3.")
        return cls(name, None if match[1] is None else int(match[1]), int(match[2]))


TABLE_1 = ("lora-r128", "lora-r1", "hollowed-k3-r128")  # Table 1's methods but for full fine-tuning


@dataclass(frozen=True)
class Protocol:
    """What is the same for all jobs of a folder; the defaults are the paper's where it says."""

    identifier: str = "sks"
    images: int = 4
    """Pictures a prompt, with the seeds 0, 1, …."""
    resolution: int | None = None
    """Side of the pictures in pixels; None is the model's own."""
    samples: int = 1000
    """Records to precompute, half of them of the class."""
    class_images: int = 1000
    """Pictures of the class, shared by its subjects."""
    training: TrainSettings = field(default_factory=TrainSettings)
    """Rank and seed are the job's."""
    sampling: SampleSettings = field(default_factory=lambda: SampleSettings(steps=50, guidance=7.5))

    def __post_init__(self) -> None:
        """Raises HollowError for numbers that cannot be."""
        Setting(resolution=self.resolution, samples=self.samples, class_images=self.class_images).check()


class Job(NamedTuple):
    """A subject to be learned by a method with a seed."""

    method: Method
    seed: int
    subject: Subject
    out: Path
    """The benchmark's folder."""

    @property
    def folder(self) -> Path:
        """What the job leaves."""
        return self.out / self.method.name / f"seed-{self.seed}" / self.subject.name

    @property
    def result(self) -> Path:
        """Its scores; the job is done when they are there."""
        return self.folder / "scores.json"


class Row(NamedTuple):
    """A row of the table."""

    method: Method
    done: int
    """Jobs, of `jobs`."""
    jobs: int
    scores: dict[str, tuple[float, float | None]]
    """{"dino": (mean, standard deviation over the seeds or None for a single one), …}; empty where none is done."""


def make_jobs(out: Path, methods: Sequence[Method], seeds: Sequence[int], subjects: Sequence[Subject]) -> list[Job]:
    """Subject by subject, so that a class's pictures are drawn once and all methods soon have a number."""
    return [Job(method, seed, subject, out) for subject, seed, method in product(subjects, seeds, methods)]


def share(jobs: Sequence[Job], process: int, processes: int) -> list[Job]:
    """Those of one of several processes: of every n-th class, as its subjects share their class pictures."""
    classes = list(dict.fromkeys(job.subject.class_word for job in jobs))
    return [job for job in jobs if job.subject.class_word in classes[process::processes]]


def check_protocol(out: Path, protocol: Protocol, **made_of: str) -> None:
    """Write down in `out` what its jobs have in common, or raise HollowError where those there have something else."""
    path, told = out / "protocol.json", json.loads(json.dumps({**made_of, **asdict(protocol)}))
    if not path.exists():
        write_json(path, told)
    known = _flat(read_json(path))
    for name, value in _flat(told).items():
        if known.get(name) != value:
            raise HollowError(f"{out} was begun with {name} {known.get(name)}, not {value}. Choose another folder.")


def run_job(
    job: Job,
    load: Callable[[], BaseModel],
    scorers: Scorers,
    protocol: Protocol,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[str, Progress], object] | None = None,
    stop: Stop | None = None,
) -> bool:
    """Do what is left of a job; False where `stop` ended it before its end.

    Raises HollowError as `personalize`, `encode` and `portions` do, and where training diverged.
    """
    if job.result.exists():
        return True
    lora = job.folder / "lora.safetensors"
    if not lora.exists():
        training = TrainSettings(**{**asdict(protocol.training), "rank": job.method.rank, "seed": job.seed})
        loaded = [load()]  # its pop hands over the only reference
        side = loaded[0].resolution if protocol.resolution is None else protocol.resolution
        request = Request(
            load_images(job.subject.folder, side, square=True),
            job.subject.class_word,
            protocol.identifier,
            Setting(job.method.cut, samples=protocol.samples, class_images=protocol.class_images, training=training),
            job.out / "class" / job.subject.class_word,
            keep=0,
        )
        work = job.folder / "work"
        outcome = personalize(loaded.pop, request, work, device=device, progress=progress, stop=stop)
        if outcome.file is None or outcome.result is None or outcome.result.stopped == "stop":
            return False
        if outcome.result.stopped != "finished":
            raise HollowError(
                f"Training {job.method.name} on {job.subject.name} met a {outcome.result.stopped}. "
                f"{outcome.result.trouble}"
            )
        write_bytes(lora, outcome.file.read_bytes())
        shutil.rmtree(work)  # hundreds of megabytes, of no further use
    if not _draw(job, load(), protocol, device, progress, stop):
        return False
    write_json(job.result, _score(job, scorers, protocol, device))
    return True


def table(jobs: Sequence[Job]) -> list[Row]:
    """What is done so far. Of each seed the mean over its subjects, then mean and deviation over the seeds."""
    rows = []
    for method in dict.fromkeys(job.method for job in jobs):
        of = [job for job in jobs if job.method == method]
        runs: dict[int, list[Score]] = {}
        for job in of:
            if job.result.exists():
                runs.setdefault(job.seed, []).append(Score(**read_json(job.result)["mean"]))
        means = [mean(scores) for scores in runs.values()]
        scores = {kind: _spread([getattr(each, kind) for each in means]) for kind in Score._fields} if means else {}
        rows.append(Row(method, sum(map(len, runs.values())), len(of), scores))
    return rows


def _spread(values: Sequence[float]) -> tuple[float, float | None]:
    return fmean(values), stdev(values) if len(values) > 1 else None


def training_bytes(model: str, methods: Sequence[Method], protocol: Protocol) -> dict[Method, int]:
    """Peak memory of each method's training, by a dry run."""
    planner, peaks = Planner(model), {}
    for method in methods:
        training = TrainSettings(**{**asdict(protocol.training), "rank": method.rank})
        setting = Setting(method.cut, protocol.resolution, samples=protocol.samples, training=training)
        peaks[method] = planner.peak("train", setting).total
    return peaks


def _draw(
    job: Job,
    model: BaseModel,
    protocol: Protocol,
    device: torch.device | str,
    progress: Callable[[str, Progress], object] | None,
    stop: Stop | None,
) -> bool:
    """The pictures that are not there yet; False where `stop` ended it."""
    pictures = _pictures(job, protocol)
    todo = [picture for picture in pictures if not picture[0].exists()]
    if not todo:
        return True
    file = lora_file.load(job.folder / "lora.safetensors", model.network.module)
    texts = encode(model, [prompt for _, prompt, _ in todo], protocol.sampling, lora=file, device=device)
    seeds, paths, done = [seed for *_, seed in todo], iter([path for path, *_ in todo]), len(pictures) - len(todo)
    for portion in portions(model, texts, seeds, protocol.sampling, lora=file, device=device, stop=stop):
        for picture in portion:
            write_png(next(paths), picture)
        done += len(portion)
        if progress is not None:
            progress("sample", Progress(done, len(pictures), 0.0))
    return done == len(pictures)


def _pictures(job: Job, protocol: Protocol) -> list[tuple[Path, str, int]]:
    """File, prompt and seed of each picture."""
    noun = f"{protocol.identifier} {job.subject.class_word}"
    return [
        (job.folder / "pictures" / f"{number:02}-{seed}.png", prompt.replace("{}", noun), seed)
        for number, prompt in enumerate(job.subject.prompts)
        for seed in range(protocol.images)
    ]


def _score(job: Job, scorers: Scorers, protocol: Protocol, device: torch.device | str) -> dict[str, Any]:
    """CLIP reads the prompts without the identifier, which means nothing to it."""
    pictures = _pictures(job, protocol)
    plain = [prompt.replace("{}", job.subject.class_word) for prompt in job.subject.prompts]
    references = picture_paths(job.subject.folder)
    with visiting(device, scorers.dino, scorers.clip):
        cache = job.out / "references" / f"{job.subject.name}.safetensors"
        of_references = scorers.cached_features(references, cache)
        of_pictures = scorers.features(open_picture(path) for path, _, _ in pictures)
        of_prompts = scorers.prompt_features(plain).repeat_interleave(protocol.images, dim=0)
    scores = score(of_references, of_pictures, of_prompts)
    return {
        "mean": mean(scores)._asdict(),
        "references": [str(path) for path in references],
        "pictures": [
            {"file": path.name, "prompt": prompt, "seed": seed, **each._asdict()}
            for (path, prompt, seed), each in zip(pictures, scores, strict=True)
        ],
    }


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    """{"training": {"steps": 1}} as {"training.steps": 1}."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        inner = _flat(value) if isinstance(value, dict) else None
        flat |= {name: value} if inner is None else {f"{name}.{key}": each for key, each in inner.items()}
    return flat
