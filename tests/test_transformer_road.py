"""The whole road on a tiny transformer of every family: what a user gets, and that an interruption changes nothing."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_transformers import FAMILY_NAMES

from hollow_core.data.images import load_images
from hollow_core.errors import HollowError
from hollow_core.lora import file as lora_file
from hollow_core.memory.setting import Setting
from hollow_core.models.base_model import load
from hollow_core.models.model import Model
from hollow_core.nets.families import FAMILIES
from hollow_core.progress import Progress
from hollow_core.request import Request
from hollow_core.road import personalize
from hollow_core.sampling.sample import SampleSettings, sample
from hollow_core.training.settings import TrainSettings

ATTENTION = {family.name: family.attention for family in FAMILIES.values()}


def ask(folder: Path, name: str, **setting: Any) -> Request:
    folder.mkdir(exist_ok=True)
    for number, color in enumerate(("red", "green")):
        Image.new("RGB", (160 + 20 * number, 200), color).save(folder / f"{number}.png")
    training = TrainSettings(rank=2, steps=4, save_every=2, targets=ATTENTION[name])
    asked = {"samples": 6, "cut": (1, 1), "training": training, **setting}
    return Request(load_images(folder, 128, square=True), "dog", setting=Setting(**asked))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_from_pictures_to_a_lora_stopped_or_not(
    name: str, transformer_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = transformer_folder(name)
    request = ask(tmp_path / "photos", name)
    whole = personalize(lambda: load(folder), request, tmp_path / "whole")
    assert whole.file is not None
    assert whole.written is not None
    expected = load_file(whole.file)
    for stage in ("precompute", "train"):
        seen: list[str] = []

        def note(stage: str, done: Progress, seen: list[str] = seen) -> None:
            seen.append(stage)

        out = tmp_path / stage
        stopped = personalize(
            lambda: load(folder), request, out, progress=note, stop=lambda stage=stage, seen=seen: stage in seen
        )
        assert (stopped.file is not None) == (stage == "train")
        found = load_file(personalize(lambda: load(folder), request, out).file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    model = load(folder)
    lora = lora_file.load(whole.file, model.network.module)
    assert lora.recipe is not None
    assert not lora.recipe.two_paths
    (picture,) = sample(model, ["a photo of a sks dog"], [0], SampleSettings(steps=1), lora=lora)
    assert picture.size == (128, 128)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_patches_of_every_family(name: str, transformer_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Of the class, too; each is told its place."""
    request = ask(tmp_path / "photos", name, patches=64, class_images=1)
    done = personalize(lambda: load(transformer_folder(name)), request, tmp_path / "run")
    assert done.file is not None
    assert {record.kind for record in done.store.records} == {"image", "prior"}
    for record in done.store.records:
        latents, prompt = done.store.inputs(record.image)
        assert latents.shape[-2:] == (8, 8)
        assert prompt.crop is not None
        assert (
            prompt.crop.rows
            == prompt.crop.columns
            == int(128 / (64 + round(record.timestep / 1000 * 16) * 4) * 4 + 0.5)
        )


@pytest.mark.slow
def test_class_pictures_are_drawn_by_the_transformer(transformer_folder: Callable[[str], Path], tmp_path: Path) -> None:
    request = ask(tmp_path / "photos", "z-image", class_images=2)
    done = personalize(lambda: load(transformer_folder("z-image")), request, tmp_path / "run")
    assert {record.kind for record in done.store.records} == {"image", "prior"}
    assert len(list((tmp_path / "run" / "class").glob("*.safetensors"))) == 2


@pytest.mark.slow
def test_memory_is_taken_off_and_encoders_leave_it(transformer_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """All of them quantised and streamed; none is alive when records are made."""
    gone: list[weakref.ref[Any]] = []

    def loaded() -> Model:
        model = load(transformer_folder("flux"))
        gone.extend(weakref.ref(part) for part in (model.vae, *model.text_encoders))
        gone.extend(weakref.ref(weight) for encoder in model.text_encoders for weight in encoder.parameters())
        return model

    alive: list[int] = []

    def look(stage: str, done: Progress) -> None:
        gc.collect()
        alive.append(sum(each() is not None for each in gone))

    request = ask(tmp_path / "photos", "flux", base_bits=8, streaming=True, tiled_vae=True)
    personalize(loaded, request, tmp_path / "run", progress=look)
    assert len(gone) > 3
    assert set(alive) == {0}


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"cut": 3}, "FLUX.1 is cut at both ends, but cut 3 is one number"),
        ({"cut": (0, 0)}, "There is no cut 0,0"),
    ],
)
def test_what_a_family_cannot_do(
    setting: dict[str, Any], sentence: str, transformer_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(HollowError, match=sentence):
        personalize(
            lambda: load(transformer_folder("flux")), ask(tmp_path / "photos", "flux", **setting), tmp_path / "run"
        )


@pytest.mark.slow
def test_time_steps_are_drawn_as_they_are_asked_for(transformer_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """More noise with the family's shift; and records of other time steps are made anew."""
    drawn = {}
    for sampling in (None, "shifted", "logit-normal", "uniform"):
        request = ask(tmp_path / "photos", "z-image", samples=40, timestep_sampling=sampling)
        load_it = lambda: load(transformer_folder("z-image"))  # noqa: E731
        done = personalize(load_it, request, tmp_path / str(sampling), stop=lambda: False)
        drawn[sampling] = sorted(record.timestep for record in done.store.records)
    assert drawn[None] == drawn["shifted"]
    means = [sum(drawn[sampling]) / 40 for sampling in ("shifted", "logit-normal", "uniform")]
    assert means[0] > 650 > 540 > means[1]
    assert drawn["uniform"][0] < drawn["logit-normal"][0]
    other = ask(tmp_path / "photos", "z-image", samples=40, timestep_sampling="uniform")
    done = personalize(load_it, other, tmp_path / "shifted")
    assert done.file.parent.name.startswith("schedule-")
    assert sorted(record.timestep for record in done.store.records) == drawn["uniform"]
