"""What an embedded model must pass before it is shipped: `python -m hollow_core.demo.gates`.

(a) What is cut out matters: of the U-Net at the demo's cut, a zeroed exit activation and one of another picture each
raise the loss; of the transformer at half of its blocks, a zeroed residual and one of another picture.
(b) The identifier is heard: after personalisation "sks cup" and "cup" give different pictures.
(c) The scene obeys: the base draws the asked background, and so does it after personalisation.
(d) Of the U-Net: it knows half-size pictures and other shapes, as its elders do. Its loss at half size is at most 1.3
times that at full size, the reader tells what it draws at half size, and pictures that are no squares keep their scene.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..lora import file as lora_file
from ..models.base_model import BaseModel, encode_prompt
from ..nets.conditioning import Conditioning
from ..nets.schedule import NoiseSchedule
from ..nets.transformer import RESIDUAL, Transformer
from ..nets.unet import head, hollow
from ..progress import Progress
from ..sampling.sample import sample
from . import language, pretrain, run, scorers, world

if TYPE_CHECKING:
    from diffusers import ZImagePipeline

Draw = Callable[[list[str]], list[Image.Image]]
"""A picture a prompt."""

EVERYTHING = [(kind, scene) for scene in world.SCENES for kind in world.CLASSES]
"""Every class on every background."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hollow-gates"), help="folder for pictures and trainings")
    parser.add_argument("--quick", action="store_true", help="without the gates that need personalisation")
    parser.add_argument("--transformer", type=Path, help="folder of the transformer, which is then tried, (a) and (c)")
    options = parser.parse_args()
    folder: Path = options.transformer or run.MODEL
    figures: dict[str, Any]
    if options.transformer:
        from . import pretrain_transformer

        pipeline = pretrain_transformer.load(folder)
        figures = ends_matter(pipeline)
        figures |= base_obeys(lambda prompts: draw(pipeline, prompts), scorers.load(), options.out)
    else:
        base = run.model()
        figures = middle_matters(base) | sizes_known(base) | shapes_obey(base, scorers.load(), options.out)
        figures |= base_obeys(
            lambda prompts: sample(base, prompts, range(len(prompts)), run.SAMPLING), scorers.load(), options.out
        )
        if not options.quick:
            figures |= personalised_obeys(options.out)
    for name, value in figures.items():
        print(name, value)
    pretrain.note(folder, "gates", figures)


@torch.no_grad()
def middle_matters(base: BaseModel, pictures: int = 512, batch: int = 64) -> dict[str, float]:
    """Gate (a): the base's loss on fresh pictures, and how much a wrong exit activation raises it."""
    choose, generator = random.Random(11), torch.Generator().manual_seed(11)
    path_to_exit, personal = head(base.unet, run.CUT), hollow(base.unet, run.CUT, None)
    totals = {"true": 0.0, "zeroed": 0.0, "foreign": 0.0}
    batches = pictures // batch
    for number in range(batches):
        clean, states = _fresh(base, batch, choose)
        # one time step for a whole batch, so that a neighbour's activation is of the same noise level
        timestep = torch.tensor([(2 * number + 1) * 500 // batches]).expand(batch)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = base.scheduler.add_noise(clean, noise, timestep)
        target = base.scheduler.get_velocity(clean, noise, timestep)
        told = Conditioning(states).kwargs()
        exit_activation = path_to_exit(noisy, timestep, **told).sample
        for name, handed in {
            "true": exit_activation,
            "zeroed": torch.zeros_like(exit_activation),
            "foreign": exit_activation.roll(1, 0),
        }.items():
            predicted: Tensor = personal(noisy, timestep, exit_activation=handed, **told).sample
            totals[name] += F.mse_loss(predicted, target).item() / batches
    return _raises(totals, "exit")


@torch.no_grad()
def sizes_known(base: BaseModel, pictures: int = 512, batch: int = 64) -> dict[str, float]:
    """Gate (d), first half: the base's loss on fresh pictures of smaller sizes, over that at full size."""
    sizes = {"half": pretrain.HALF, "three_quarters": pretrain.THREE_QUARTERS, "full": pretrain.FULL}
    losses = dict.fromkeys(sizes, 0.0)
    batches = pictures // batch
    for (name, shape), number in product(sizes.items(), range(batches)):
        clean, states = _fresh(base, batch, random.Random(number), shape)
        timesteps = (torch.arange(batch) * batches + number) * 1000 // pictures  # all of them, evenly
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(number))
        noisy = base.scheduler.add_noise(clean, noise, timesteps)
        target = base.scheduler.get_velocity(clean, noise, timesteps)
        losses[name] += F.mse_loss(base.unet(noisy, timesteps, states).sample, target).item() / batches
    return {f"{name}_over_full_loss": round(losses[name] / losses["full"], 3) for name in sizes if name != "full"}


def _fresh(
    base: BaseModel, number: int, choose: random.Random, shape: pretrain.Shape = pretrain.FULL
) -> tuple[Tensor, Tensor]:
    """Latents of freshly drawn pictures, and their embedded captions (number, 24, 96)."""
    drawn, subjects, scenes = pretrain.drawn(number, choose, shape)
    clean = base.vae.encode(drawn).latents if base.vae is not None else drawn
    texts = [world.photo_caption(s.describe(), scene) for s, scene in zip(subjects, scenes, strict=True)]
    return clean, torch.cat([encode_prompt(base, text).encoder_hidden_states for text in texts])


def shapes_obey(base: BaseModel, judge: scorers.Scorers, out: Path, every: int = 1) -> dict[str, float]:
    """Gate (d), second half: every class on every background at half size, and in shapes that are no squares, as the
    reader sees them at its own size; `every` n-th of these pictures only."""
    asked = EVERYTHING[::every]
    prompts = [world.photo_caption(kind, scene) for kind, scene in asked]
    figures = {}
    out.mkdir(parents=True, exist_ok=True)
    for name, (width, height) in {"half": pretrain.HALF, "wide": (96, 64), "tall": (64, 96)}.items():
        settings = replace(run.SAMPLING, size=(height, width), together=12)
        drawn = sample(base, prompts, range(len(prompts)), settings)
        seen = [picture.resize((world.SIZE, world.SIZE), Image.Resampling.BICUBIC) for picture in drawn]
        _sheet(drawn, len(world.CLASSES)).save(out / f"{name}.png")
        figures[f"{name}_scene_score"] = round(judge.prompt_score(seen, [scene for _, scene in asked]), 3)
        if name == "half":
            figures[f"{name}_class_score"] = round(judge.class_score(seen, [kind for kind, _ in asked]), 3)
    return figures


@torch.no_grad()
def ends_matter(pipeline: "ZImagePipeline", pictures: int = 256, levels: int = 16) -> dict[str, float]:
    """Gate (a) of the transformer: the same of its residual, with half of its blocks out, evenly of both ends."""
    from .pretrain_transformer import encode

    choose, generator = random.Random(11), torch.Generator().manual_seed(11)
    network, schedule = Transformer(pipeline.transformer), NoiseSchedule.flow()
    quarter = pipeline.transformer.config.n_layers // 4
    base_path, hollowed = network.base((quarter, quarter)), network.hollow((quarter, quarter), None)
    totals = {"true": 0.0, "zeroed": 0.0, "foreign": 0.0}
    for level in range(levels):
        timestep = (2 * level + 1) * 500 // levels  # of a whole group, so that a neighbour's residual is of it, too
        drawn, subjects, scenes = pretrain.drawn(pictures // levels, choose)
        clean = pipeline.vae.encode(drawn).latents
        texts = [world.photo_caption(s.describe(), scene) for s, scene in zip(subjects, scenes, strict=True)]
        prompts = [Conditioning(states[None]) for states in encode(pipeline, texts)]
        noise = torch.randn(clean.shape, generator=generator)
        noisy, target = schedule.noisy(clean, noise, timestep), schedule.target(clean, noise, timestep)
        records = [base_path(one[None], [timestep], prompt) for one, prompt in zip(noisy, prompts, strict=True)]
        for number, (one, prompt, record) in enumerate(zip(noisy, prompts, records, strict=True)):
            for name, residual in {
                "true": record[RESIDUAL],
                "zeroed": torch.zeros_like(record[RESIDUAL]),
                "foreign": records[number - 1][RESIDUAL],
            }.items():
                predicted = hollowed.predict(one[None], [timestep], prompt, {**record, RESIDUAL: residual})
                totals[name] += F.mse_loss(predicted[0], target[number]).item() / pictures
    return _raises(totals, "residual")


def _raises(losses: dict[str, float], what: str) -> dict[str, float]:
    return {"base_loss": round(losses["true"], 5)} | {
        f"{name}_{what}_raises_loss_percent": round(100 * (losses[name] / losses["true"] - 1), 1)
        for name in ("zeroed", "foreign")
    }


def draw(pipeline: "ZImagePipeline", prompts: list[str], steps: int = 30, guidance: float = 3.0) -> list[Image.Image]:
    """With seeds from 0 on. `guidance` is counted as Stable Diffusion does; Z-Image's is one less."""
    pipeline.set_progress_bar_config(disable=True)
    drawn: list[Image.Image] = pipeline(
        list(prompts),
        height=world.SIZE,
        width=world.SIZE,
        num_inference_steps=steps,
        guidance_scale=guidance - 1,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
        max_sequence_length=language.MAX_TOKENS,
    ).images
    return drawn


def base_obeys(draw: Draw, judge: scorers.Scorers, out: Path) -> dict[str, float]:
    """Gate (c), first half: every class on every background, by class word; scene and class as the reader sees them."""
    asked = EVERYTHING
    prompts = [world.photo_caption(kind, scene) for kind, scene in asked]
    drawn = draw(prompts)
    described = [world.random_subject(random.Random(seed)) for seed in range(24)]
    scenes = list(world.SCENES)
    detailed = [world.photo_caption(s.describe(), scenes[i % len(scenes)]) for i, s in enumerate(described)]
    out.mkdir(parents=True, exist_ok=True)
    _sheet(drawn, len(world.CLASSES)).save(out / "base.png")
    _sheet(draw(detailed), 12).save(out / "described.png")
    return {
        "base_scene_score": round(judge.prompt_score(drawn, [scene for _, scene in asked]), 3),
        "base_class_score": round(judge.class_score(drawn, [kind for kind, _ in asked]), 3),
    }


def personalised_obeys(out: Path) -> dict[str, Any]:
    """Gates (b) and (c), second half, on the first six held-out subjects with the demo's settings.

    Trainings are kept in `out`, so that a stopped run goes on.
    """
    judge = scorers.load()
    rows: list[dict[str, float]] = []
    for number, subject in enumerate(world.HELD_OUT[:6]):
        references = out / f"subject-{number}"
        run.write_references(references, subject)
        trained = run.train(out / f"subject-{number}-hollowed", references, subject, run.CUT, progress=_print)
        base = run.model()
        lora = lora_file.load(trained.file, base.unet)
        scenes = list(world.NEW_SCENES) * 2
        heard, unheard = (run.draw(base, noun, scenes, lora=lora) for noun in (run.called(subject), subject.kind))
        _sheet([*heard, *unheard], len(scenes)).save(out / f"subject-{number}.png")
        real = [picture for _, picture in world.reference_pictures(subject)]
        difference = (world.to_tensor(heard) - world.to_tensor(unheard)).abs().mean().item()
        rows.append(
            {
                "subject_with_identifier": judge.subject_score(heard, real),
                "subject_without_identifier": judge.subject_score(unheard, real),
                "pixel_difference": difference / 2,
                "scene_score": judge.prompt_score(heard, scenes),
            }
        )
        print(subject.kind, {name: round(value, 3) for name, value in rows[-1].items()}, flush=True)
    return {name: [round(row[name], 3) for row in rows] for name in rows[0]} | {
        f"mean_{name}": round(sum(row[name] for row in rows) / len(rows), 3) for name in rows[0]
    }


def _print(stage: str, done: Progress) -> None:
    if done.step % 100 == 0:
        print(stage, done.step, done.loss, flush=True)


def _sheet(drawn: list[Image.Image], columns: int) -> Image.Image:
    width, height = (2 * side for side in drawn[0].size)
    sheet = Image.new("RGB", (columns * width, -(-len(drawn) // columns) * height))
    for number, picture in enumerate(drawn):
        sheet.paste(picture.resize((width, height)), (number % columns * width, number // columns * height))
    return sheet


if __name__ == "__main__":
    main()
