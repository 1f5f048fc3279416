"""One training of one subject in one way with one seed, and the scores of its pictures in every use."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import held_out
from hollow_core.analysis.report import analyze_files
from hollow_core.data.prompts import generic_prompt
from hollow_core.demo import run, world
from hollow_core.demo.run import LORA_FILE
from hollow_core.files import read_json, read_safetensors, write_json, write_safetensors
from hollow_core.lora import file as lora_file
from hollow_core.lora.file import LoraFile
from hollow_core.lora.metadata import recipe_for
from hollow_core.memory.setting import Setting
from hollow_core.models.base_model import BaseModel, encode_prompt, keep_small
from hollow_core.nets.network import Network, at_cut
from hollow_core.nets.unet_layers import layers
from hollow_core.request import Request, make_examples
from hollow_core.sampling.prior import class_latents
from hollow_core.sampling.sample import SampleSettings
from hollow_core.training.precompute import Example, model_id, precompute
from hollow_core.training.settings import TrainSettings
from hollow_core.training.store import Store
from hollow_core.training.train import TrainResult, train

from .baselines import Diverged, distill, finetune, pruned, strays
from .ways import COARSER, HOLLOWED, LORA, WITHOUT_PRIOR, Way, Wording, learned

REFRESH = (1, 3, 2, 5)
"""Of all subjects the first two, of the wider tables' all."""
ONE, TWO = "one path", "two paths"
ONE_COARSER = f"{ONE}, coarser word"


@dataclass(frozen=True)
class Extent:
    """How much of it all."""

    steps: int = held_out.STEPS
    distill_steps: int = 500


class Trial(NamedTuple):
    """A subject, of `held_out.SUBJECTS`, to be learned in a way with a seed."""

    out: Path
    """The benchmark's folder."""
    way: Way
    subject: int
    seed: int

    @property
    def folder(self) -> Path:
        """What it leaves."""
        return self.out / "trials" / self.way.name / f"seed-{self.seed}" / f"subject-{self.subject}"

    @property
    def result(self) -> Path:
        """Its row; the trial is done when it is there."""
        return self.folder / "row.json"

    def row(self) -> dict[str, dict[str, float]]:
        """{use: {"subject": …, "scene": …, …}, "took": {"seconds": …}}."""
        found: dict[str, dict[str, float]] = read_json(self.result)
        return found


def use_of(way: Way) -> str:
    """How a way's LoRA is meant to be used."""
    return TWO if way.method == "hollowed" else ONE


def base_row(out: Path, subject: int) -> dict[str, float]:
    """Scores of the base model, which knows nothing of the subject."""
    row: dict[str, float] = held_out.kept(
        out / "base" / f"subject-{subject}.json",
        lambda: held_out.scores(run.model(), held_out.SUBJECTS[subject], None),
    )
    return row


def strayed(out: Path, way: Way, extent: Extent) -> float:
    """How far a pruned way's U-Net is from the whole one, before it learns a subject."""

    def measure() -> float:
        base = run.model()
        return round(strays(_pruned(out, way, base, extent), base), 4)

    found: float = held_out.kept(out / "strayed" / f"{way.name}.json", measure)
    return found


def most_changed(out: Path, extent: Extent) -> list[str]:
    """The half of the U-Net's blocks whose weights change most where a LoRA is everywhere, as the analyzer says of the
    subjects on whom settings are chosen."""

    def measure() -> list[str]:
        number = len(world.HELD_OUT)
        trials = [Trial(out, LORA, number + place, 0) for place in range(len(world.CHOSEN_ON))]
        for trial in trials:
            run_trial(trial, extent)
        found = analyze_files([trial.folder / LORA_FILE for trial in trials], run.MODEL)
        changes = {
            layer.name: sum(change.relative or 0.0 for each in found if (change := each.block(layer)))
            for layer in layers(found[0].config)
            if found[0].block(layer)
        }
        return sorted(changes, key=lambda name: -changes[name])[: len(changes) // 2]

    names: list[str] = held_out.kept(out / "most-changed.json", measure)
    return names


def run_trial(trial: Trial, extent: Extent) -> None:
    """Do it, if it was not done. Interrupted, it begins anew."""
    if trial.result.exists():
        return
    started = time.monotonic()
    shutil.rmtree(trial.folder, ignore_errors=True)
    way, subject, base = trial.way, held_out.SUBJECTS[trial.subject], run.model()
    keep_small(base, "cpu", base_bits=way.bits)
    changed = most_changed(trial.out, extent) if way.learning == "most changed blocks" else ()
    settings = replace(
        run.SETTINGS,
        rank=way.rank,
        targets=learned(way, base.network, run.SETTINGS.targets, changed),
        learning_rate=way.learning_rate,
        steps=extent.steps,
        save_every=0,
        seed=trial.seed,
    )
    store = precompute(
        base.network,
        base.schedule,
        _examples(trial, base),
        trial.out / "stores" / f"subject-{trial.subject}-seed-{trial.seed}",
        cut=way.cut if way.method == "hollowed" else None,
        samples=way.samples,
        seed=trial.seed,
        apart=True,  # ways that differ in other things share it
        together=held_out.AT_ONCE,
    )
    if way.method == "full":
        finetune(base.unet, base.schedule, store, settings)
        rows = {ONE: held_out.scores(base, subject, None)}
    elif way.method in ("pruned", "pruned, distilled"):
        assert way.cut is not None
        base.unet = _pruned(trial.out, way, base, extent)
        _trained(trial, base.network, base, store, settings)
        rows = {ONE: held_out.scores(base, subject, None)}  # the LoRA is in it
    else:
        network = at_cut(base.network, way.cut, range(1000))
        result = _trained(trial, network, base, store, settings)
        recipe = recipe_for(way.cut, run.IDENTIFIER, way.kind_of(subject), base.schedule.prediction.name)
        file = trial.folder / LORA_FILE
        lora_file.save(
            file, result.state, base.unet.config, alpha=settings.lora_alpha, layout=base.layout, recipe=recipe
        )
        rows = _uses(way, trial.subject, lora_file.load(file, base.unet))
    write_json(trial.result, rows | {"took": {"seconds": round(time.monotonic() - started, 1)}})
    for path in trial.folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != trial.result and not (way == LORA and path.name == LORA_FILE):  # for benchmarks.analysis
            path.unlink()


def _trained(trial: Trial, network: Network, base: BaseModel, store: Store, settings: TrainSettings) -> TrainResult:
    """Raises Diverged where it did: what is left is of an earlier step."""
    result = train(network, base.schedule, store, settings, folder=trial.folder)
    if result.stopped != "finished":
        raise Diverged(f"{trial.folder} ended with a {result.stopped} after {result.steps} steps.")
    return result


def _examples(trial: Trial, base: BaseModel) -> list[Example]:
    """The subject's pictures, once for each prompt that the base path has for them, and those of its class."""
    way, subject = trial.way, held_out.SUBJECTS[trial.subject]
    kind = way.kind_of(subject)
    images = held_out.references(trial.folder / "references", subject, way.side)
    images = [image._replace(caption=(image.caption or "").replace(subject.kind, kind)) for image in images]
    request = Request(images, kind, run.IDENTIFIER, Setting(way.cut, class_images=way.class_images))
    drawn: Sequence[torch.Tensor] = []
    if way.class_images:
        name = f"subject-{trial.subject}-seed-{trial.seed}" + (f"-{way.called}" if way.called else "")
        name += "" if way.side == world.SIZE else f"-{way.side}px"
        name += "" if way.bits is None else f"-{way.bits}bit"
        of_class = trial.out / "class" / name
        made_by = model_id(base.network)
        drawn = class_latents(
            base, request.drawn, of_class, made_by=made_by, seed=trial.seed, together=held_out.AT_ONCE
        )
    examples = make_examples(base, request, drawn)
    of_subject, of_class_word = ([one for one in examples if one.kind == which] for which in ("image", "prior"))
    worded = [base_prompts(way.generic, example.personal_prompt, kind) for example in of_subject]
    return [
        replace(example, generic=encode_prompt(base, text), generic_prompt=text)
        for texts in zip(*worded, strict=True)
        for example, text in zip(of_subject, texts, strict=True)
    ] + of_class_word


def base_prompts(wording: Wording, personal: str, kind: str) -> list[str]:
    """The base path's prompts in a wording: "a photo of a thing on the grass" in place of "… a sks cup …"."""
    coarser = personal.replace(f"{run.IDENTIFIER} {kind}", COARSER)
    return {
        "class word": [generic_prompt(personal, run.IDENTIFIER)],
        "coarser word": [coarser],
        "empty": [""],
        "personal": [personal],
        "coarser word or personal": [coarser, personal],
    }[wording]


def _uses(way: Way, number: int, lora: LoraFile) -> dict[str, dict[str, float]]:
    """The same file on one path and, if hollowed, on two, the main way's with every refresh."""
    subject, base, is_wider = held_out.SUBJECTS[number], run.model(), number in held_out.WIDER
    noun = f"{run.IDENTIFIER} {way.kind_of(subject)}"
    rows = {}
    if way.cut is None or way == HOLLOWED or is_wider:
        rows[ONE] = held_out.scores(base, subject, lora, single_path=True, noun=noun)
    if way.generic.startswith("coarser word"):  # as the base path knew it
        coarser = f"{run.IDENTIFIER} {COARSER}"
        rows[ONE_COARSER] = held_out.scores(base, subject, lora, single_path=True, noun=coarser)
    if is_wider and way in (*WITHOUT_PRIOR, *WITHOUT_PRIOR.values()):
        rows["no identifier"] = held_out.scores(base, subject, lora, noun=subject.kind)
    if way.cut is None:
        return rows
    for refresh in (REFRESH if is_wider else REFRESH[:2]) if way == HOLLOWED else (1,):
        use = TWO if refresh == 1 else f"{TWO}, refresh {refresh}"
        settings = replace(held_out.SAMPLING, refresh=refresh)
        if way.generic == "class word":
            rows[use] = held_out.scores(base, subject, lora, settings, noun=noun)
        else:
            rows[use] = _scores_worded(way.generic, base, subject, lora, settings)
    return rows


def _scores_worded(
    wording: Wording, base: BaseModel, subject: world.Subject, lora: LoraFile, settings: SampleSettings
) -> dict[str, float]:
    """`held_out.scores`, the base path under the prompts on which it was precomputed."""
    prompts = [world.photo_caption(run.called(subject), scene) for scene in held_out.SCENES]
    generics = [base_prompts(wording, prompt, subject.kind)[0] for prompt in prompts]
    drawn = run.draw(base, run.called(subject), held_out.SCENES, settings, lora=lora, generics=generics)
    return held_out.judged(drawn, subject)


def _pruned(out: Path, way: Way, base: BaseModel, extent: Extent) -> Any:
    """The U-Net without its middle; one that is distilled is kept, as all subjects and seeds begin from it."""
    assert way.cut is not None
    small = pruned(run.model().unet, way.cut)
    if way.method == "pruned":
        return small
    path, told = out / f"distilled-k{way.cut}.safetensors", {"steps": str(extent.distill_steps)}
    if not path.exists():
        distill(small, base, extent.distill_steps)
        write_safetensors(path, small.state_dict(), told)
    small.load_state_dict(read_safetensors(path)[0])
    return small
