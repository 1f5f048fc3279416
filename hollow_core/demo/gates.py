"""What the embedded model must pass before it is shipped: `python -m hollow_core.demo.gates`.

(a) The middle matters: at the demo's cut, a zeroed exit activation and one of another picture each raise the loss.
(b) The identifier is heard: after personalisation "sks cup" and "cup" give different pictures.
(c) The scene obeys: the base draws the asked background, and so does it after personalisation.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..lora import file as lora_file
from ..models.base_model import BaseModel, encode_prompt
from ..nets.conditioning import Conditioning
from ..nets.unet import head, hollow
from ..progress import Progress
from ..sampling.sample import sample
from . import pretrain, run, scorers, world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hollow-gates"), help="folder for pictures and trainings")
    parser.add_argument("--quick", action="store_true", help="without the gates that need personalisation")
    options = parser.parse_args()
    figures: dict[str, Any] = middle_matters(run.model())
    figures |= base_obeys(run.model(), scorers.load(), options.out)
    if not options.quick:
        figures |= personalised_obeys(options.out)
    for name, value in figures.items():
        print(name, value)
    pretrain.note(run.MODEL, "gates", figures)


@torch.no_grad()
def middle_matters(base: BaseModel, pictures: int = 512, batch: int = 64) -> dict[str, float]:
    """Gate (a): the base's loss on fresh pictures, and how much a wrong exit activation raises it."""
    choose, generator = random.Random(11), torch.Generator().manual_seed(11)
    path_to_exit, personal = head(base.unet, run.CUT), hollow(base.unet, run.CUT, None)
    totals = {"true": 0.0, "zeroed": 0.0, "foreign": 0.0}
    batches = pictures // batch
    for number in range(batches):
        drawn, subjects, scenes = pretrain.drawn(batch, choose)
        clean = base.vae.encode(drawn).latents if base.vae is not None else drawn
        texts = [world.photo_caption(s.describe(), scene) for s, scene in zip(subjects, scenes, strict=True)]
        states = torch.cat([encode_prompt(base, text).encoder_hidden_states for text in texts])
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
    return {
        "base_loss": round(totals["true"], 5),
        "zeroed_exit_raises_loss_percent": round(100 * (totals["zeroed"] / totals["true"] - 1), 1),
        "foreign_exit_raises_loss_percent": round(100 * (totals["foreign"] / totals["true"] - 1), 1),
    }


def base_obeys(base: BaseModel, judge: scorers.Scorers, out: Path) -> dict[str, float]:
    """Gate (c), first half: every class on every background, by class word; scene and class as the reader sees them."""
    asked = [(kind, scene) for scene in world.SCENES for kind in world.CLASSES]
    prompts = [world.photo_caption(kind, scene) for kind, scene in asked]
    drawn = sample(base, prompts, range(len(prompts)), run.SAMPLING)
    described = [world.random_subject(random.Random(seed)) for seed in range(24)]
    scenes = list(world.SCENES)
    detailed = [world.photo_caption(s.describe(), scenes[i % len(scenes)]) for i, s in enumerate(described)]
    out.mkdir(parents=True, exist_ok=True)
    _sheet(drawn, len(world.CLASSES)).save(out / "base.png")
    _sheet(sample(base, detailed, range(24), run.SAMPLING), 12).save(out / "described.png")
    return {
        "base_scene_score": round(judge.prompt_score(drawn, [scene for _, scene in asked]), 3),
        "base_class_score": round(judge.class_score(drawn, [kind for kind, _ in asked]), 3),
    }


def personalised_obeys(out: Path) -> dict[str, Any]:
    """Gates (b) and (c), second half, on the held-out subjects with the demo's settings.

    Trainings are kept in `out`, so that a stopped run goes on.
    """
    judge = scorers.load()
    rows: list[dict[str, float]] = []
    for number, subject in enumerate(world.HELD_OUT):
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


def _sheet(drawn: list[Any], columns: int) -> Any:
    from PIL import Image

    side = world.SIZE * 2
    sheet = Image.new("RGB", (columns * side, -(-len(drawn) // columns) * side))
    for number, picture in enumerate(drawn):
        sheet.paste(picture.resize((side, side)), (number % columns * side, number // columns * side))
    return sheet


if __name__ == "__main__":
    main()
