"""What judges the demo's pictures: a subject encoder in the place of DINO, a reader of scene and class for CLIP-T."""

import random
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from ..files import read_safetensors, write_safetensors
from . import world

FILE = "scorers.safetensors"  # beside this module; they are no part of the model that they judge


class Encoder(nn.Sequential):
    """Pictures (batch, 3, 64, 64) in −1…1 → features (batch, width)."""

    def __init__(self, width: int) -> None:
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128), (128, 128)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
            if after > 32:
                layers += [nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(8, after), nn.SiLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(128 * 16, 128), nn.SiLU(), nn.Linear(128, width))


class Scorers(nn.Module):
    """Both networks, and the scores that reports print."""

    def __init__(self) -> None:
        super().__init__()
        self.subject = Encoder(64)
        self.reader = Encoder(len(world.SCENES) + len(world.CLASSES))

    @torch.no_grad()
    def subject_score(self, pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> float:
        """Mean pairwise cosine between pictures and references, as DINO's in the paper; 1 is the same individual."""
        ours, theirs = (self.embed(world.to_tensor(list(batch))) for batch in (pictures, references))
        return (ours @ theirs.T).mean().item()

    @torch.no_grad()
    def prompt_score(self, pictures: Sequence[Image.Image], scenes: Sequence[str]) -> float:
        """Mean probability that the reader gives to the scene that was asked for."""
        return self._probability(pictures, slice(0, len(world.SCENES)), [list(world.SCENES).index(s) for s in scenes])

    @torch.no_grad()
    def class_score(self, pictures: Sequence[Image.Image], kinds: Sequence[str]) -> float:
        """Mean probability that the reader gives to the class that was asked for."""
        return self._probability(pictures, slice(len(world.SCENES), None), [world.CLASSES.index(k) for k in kinds])

    def embed(self, pictures: torch.Tensor) -> torch.Tensor:
        """Unit vectors (batch, 64)."""
        return F.normalize(self.subject(pictures), dim=1)

    def _probability(self, pictures: Sequence[Image.Image], part: slice, asked: list[int]) -> float:
        readings = self.reader(world.to_tensor(list(pictures)))[:, part].softmax(1)
        return readings[torch.arange(len(asked)), asked].mean().item()


def load(folder: Path = Path(__file__).parent) -> Scorers:
    """The trained scorers."""
    state, _ = read_safetensors(folder / FILE)
    scorers = Scorers()
    scorers.load_state_dict(state)
    return scorers.eval().requires_grad_(False)


def train(out: Path, steps: int = 900, batch: int = 64) -> dict[str, Any]:
    """Contrastive for the subject (hard negatives: one attribute changed), cross-entropy for the reader."""
    torch.manual_seed(0)
    scorers = Scorers()
    optimizer = torch.optim.AdamW(scorers.parameters(), lr=1e-3, weight_decay=0.01)
    generator, choose, scenes = torch.Generator().manual_seed(0), random.Random(6), list(world.SCENES)
    started = time.monotonic()
    for step in range(steps):
        subjects = [world.random_subject(choose) for _ in range(batch // 2)]
        subjects += [_nearly(subject, choose) for subject in subjects]
        seen = [[choose.choice(scenes) for _ in subjects] for _ in range(2)]
        views = [
            _spoiled(
                world.to_tensor([world.draw(s, scene, choose) for s, scene in zip(subjects, view, strict=True)]),
                generator,
            )
            for view in seen
        ]
        with torch.autocast("cpu", torch.bfloat16):
            one, two = (scorers.subject(view).float() for view in views)
            readings = scorers.reader(views[0]).float()
        alike = F.normalize(one, dim=1) @ F.normalize(two, dim=1).T / 0.1
        same = torch.arange(batch)
        contrast = (F.cross_entropy(alike, same) + F.cross_entropy(alike.T, same)) / 2
        scene_loss = F.cross_entropy(readings[:, : len(scenes)], torch.tensor([scenes.index(s) for s in seen[0]]))
        kinds = torch.tensor([world.CLASSES.index(s.kind) for s in subjects])
        class_loss = F.cross_entropy(readings[:, len(scenes) :], kinds)
        loss = contrast + scene_loss + class_loss
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (steps - step) / (0.4 * steps))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            losses = f"{contrast.item():.3f} {scene_loss.item():.3f} {class_loss.item():.3f}"
            print(f"scorers {step}/{steps} losses {losses} {time.monotonic() - started:.0f} s", flush=True)
    write_safetensors(out / FILE, {name: value.half() for name, value in scorers.state_dict().items()})
    return {"steps": steps, **check(load(out))}


def check(scorers: Scorers) -> dict[str, float]:
    """How well real pictures are told apart: held-out subjects among themselves, against others of their class."""
    choose = random.Random(7)
    same, other = [], []
    pictures, scenes, kinds = [], [], []
    for subject in world.HELD_OUT:
        references = [picture for _, picture in world.reference_pictures(subject)]
        again = [world.draw(subject, scene, choose) for scene in world.NEW_SCENES]
        same.append(scorers.subject_score(again, references))
        strangers = [replace(world.random_subject(choose), kind=subject.kind) for _ in range(20)]
        drawn = [world.draw(stranger, choose.choice(list(world.SCENES)), choose) for stranger in strangers]
        other.append(scorers.subject_score(drawn, references))
        for _ in range(20):
            scenes.append(choose.choice(list(world.SCENES)))
            kinds.append(subject.kind)
            pictures.append(world.draw(subject, scenes[-1], choose))
    return {
        "same_subject": round(sum(same) / len(same), 3),
        "same_subject_least": round(min(same), 3),
        "same_class": round(sum(other) / len(other), 3),
        "scene": round(scorers.prompt_score(pictures, scenes), 3),
        "class": round(scorers.class_score(pictures, kinds), 3),
    }


def _nearly(subject: world.Subject, choose: random.Random) -> world.Subject:
    """The same individual but for one attribute."""
    while True:
        attribute = choose.choice([field.name for field in fields(subject) if field.name != "kind"])
        other = replace(subject, **{attribute: getattr(world.random_subject(choose), attribute)})
        visible = other.describe() != subject.describe()  # the accent shows only on an emblem or accessory
        if visible and other.color != other.second:
            return other


def _spoiled(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the pictures blurred and noisy, as generated ones may be."""
    blurred = F.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
    share = torch.rand(len(pictures), 1, 1, 1, generator=generator)
    noise = (
        torch.randn(pictures.shape, generator=generator)
        * 0.15
        * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    )
    spoiled = torch.lerp(pictures, blurred, share) + noise
    chosen = torch.rand(len(pictures), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen, spoiled, pictures)
