"""What people bring and ask for, down the whole road on a tiny model: buckets, folders, captions, masks, styles."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_pipelines import shallow_pipeline
from tiny_training import same

from hollow_core.data.captions import CaptionChanges
from hollow_core.data.folders import load_pictures
from hollow_core.data.images import load_images
from hollow_core.data.prompts import Subject
from hollow_core.errors import HollowError
from hollow_core.lora.file import keep_last
from hollow_core.lora.file import load as load_lora
from hollow_core.memory.setting import Setting
from hollow_core.models.base_model import BaseModel, load
from hollow_core.request import Request, low_examples, make_examples, patch_examples
from hollow_core.road import Outcome, personalize
from hollow_core.sampling.sample import SampleSettings, sample
from hollow_core.training.precompute import HELD_OUT_LOOKS, Example, plan_for
from hollow_core.training.settings import TrainSettings
from hollow_core.training.store import Record, Store


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {layout: tmp_path_factory.mktemp(layout) for layout in ("sd21", "sdxl")}
    for layout, folder in folders.items():
        shallow_pipeline(layout).save_pretrained(folder)
    return folders


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Wide, square and high."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, (size, color) in enumerate({(330, 200): "red", (200, 200): "green", (200, 330): "blue"}.items()):
        Image.new("RGB", size, color).save(folder / f"{number}.png")
    return folder


def ask(photos: Path, *, training: Any = (), setting: Any = (), **more: Any) -> Request:
    settings = TrainSettings(**{"rank": 2, "steps": 6, "save_every": 2} | dict(training))
    setting = Setting(**{"samples": 12, "training": settings} | dict(setting))
    images = more.pop("images", None) or load_images(photos, 256)
    return Request(images, setting=setting, **{"class_word": "dog"} | more)


def run(folder: Path, request: Request, out: Path, **how: Any) -> Outcome:
    return personalize(lambda: load(folder), request, out, **how)


def content(file: Path | None) -> dict[str, torch.Tensor]:
    assert file is not None
    with safe_open(file, "pt") as lora:
        return {name: lora.get_tensor(name) for name in list(lora.keys())}


def recipe(file: Path | None) -> dict[str, Any]:
    assert file is not None
    with safe_open(file, "pt") as lora:
        metadata = lora.metadata()
    return {key.removeprefix("hollow."): json.loads(value) for key, value in metadata.items() if "hollow." in key}


@pytest.mark.slow
def test_mixed_sizes_go_the_whole_road(folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """With class pictures drawn in their sizes, and low twins; interrupted and together, it ends as it would."""
    request = ask(
        photos,
        setting={"class_images": 3},
        training={"strategy": "selective", "together": 4, "batch": 2},
    )
    whole = run(folders["sd21"], request, tmp_path / "whole")
    assert whole.store is not None
    sizes = [whole.store.inputs(image)[0].shape[-2:] for image in range(12)]
    wide_square_high = [(24, 40), (32, 32), (40, 24)]
    assert sizes[:6] == wide_square_high * 2  # pictures, and those drawn of the class
    assert sizes[6:] == [(12, 20), (16, 16), (20, 12)] * 2

    def run_until(call: int) -> None:
        left = [call]

        def stop() -> bool:
            left[0] -= 1
            return left[0] < 0

        run(folders["sd21"], request, tmp_path / "stopped", stop=stop)

    for call in (40, 115, 20):  # within a class picture, before a record, and between
        run_until(call)
    again = run(folders["sd21"], request, tmp_path / "stopped")
    assert same(content(whole.file), content(again.file))


def test_sdxl_is_told_each_pictures_sizes(folders: dict[str, Path], photos: Path) -> None:
    """As diffusers' own script for SDXL tells them: original, crop, target."""
    model = load(folders["sdxl"])
    request = ask(photos, class_pictures=load_images(photos, 256)[:1])
    examples = make_examples(model, request, [])
    expected = [[200, 330, 1, 0, 192, 320], [200, 200, 0, 0, 256, 256], [330, 200, 0, 1, 320, 192]]
    told = [example.personal.time_ids for example in examples]
    assert [None if ids is None else ids[0].tolist() for ids in told] == [*expected, expected[0]]
    for example in examples:
        assert torch.equal(example.generic.time_ids, example.personal.time_ids)  # type: ignore[arg-type]
    low = low_examples(model, request, examples, [])
    ids = [example.personal.time_ids for example in low]
    assert [None if one is None else one[0].tolist() for one in ids][:2] == [
        [200, 330, 0, 0, 96, 160],
        [200, 200, 0, 0, 128, 128],
    ]


@pytest.mark.slow
def test_kohyas_folders_train_several_subjects_in_one_lora(folders: dict[str, Path], tmp_path: Path) -> None:
    """A class folder may be named as its subject's: its pictures are of the class all the same."""
    root = tmp_path / "project"
    for name, number in {"img/2_sks dog": 2, "img/1_xyz cat": 1, "reg/1_sks dog": 1, "reg/1_cat": 1}.items():
        (root / name).mkdir(parents=True)
        for picture in range(number):
            Image.new("RGB", (256, 256), (picture * 90, 80, 10)).save(root / name / f"{name[-3:]}{picture}.png")
    found = load_pictures(root, 256)
    samples = {"samples": 20}
    request = ask(root, images=found.images, class_pictures=found.of_class, class_word="", setting=samples)
    outcome = run(folders["sd21"], request, tmp_path / "out")
    assert outcome.store is not None
    records = [record.image for record in outcome.store.records if record.kind == "image"]
    assert [records.count(image) for image in range(3)] == [2, 4, 4]  # by name: xyz cat, twice sks dog
    prompts = [(each["personal"], each["generic"]) for each in outcome.store.fingerprint.prompts]
    assert prompts == [
        ("a photo of a xyz cat", "a photo of a cat"),
        *[("a photo of a sks dog", "a photo of a dog")] * 2,
        ("a photo of a cat", "a photo of a cat"),
        ("a photo of a dog", "a photo of a dog"),
    ]
    told = recipe(outcome.file)
    assert (told["identifier"], told["class_word"]) == ("xyz, sks", "cat, dog")
    with safe_open(outcome.file, "pt") as file:  # type: ignore[arg-type]
        assert file.metadata()["modelspec.trigger_phrase"] == "xyz cat, sks dog"

    # the base path hears of neither, whichever is asked for
    model = load(folders["sd21"])
    lora = load_lora(outcome.file, model.unet)  # type: ignore[arg-type]
    settings = SampleSettings(steps=2, size=(64, 64))
    prompt, generic = "a sks dog beside a xyz cat", "a dog beside a cat"
    (by_itself,) = sample(model, [prompt], [0], settings, lora=lora)
    (told_so,) = sample(model, [prompt], [0], settings, lora=lora, generics=[generic])
    assert by_itself.tobytes() == told_so.tobytes()


def test_a_repeated_picture_has_as_many_records(folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    loaded = zip(load_images(photos, 256), (20, 10, 10), strict=True)
    images = [image._replace(repeats=repeats) for image, repeats in loaded]
    outcome = run(folders["sd21"], ask(photos, images=images, setting={"cut": None}), tmp_path / "out")
    assert outcome.store is not None
    records = [record.image for record in outcome.store.records]
    assert [records.count(image) for image in range(3)] == [6, 3, 3]


@pytest.mark.slow
def test_a_style_needs_no_identifier(folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    for number, caption in enumerate(("a house, in ink", "a tree, in ink", "a cat, in ink")):
        (photos / f"{number}.txt").write_text(caption)
    outcome = run(folders["sd21"], ask(photos, identifier="", class_word=""), tmp_path / "out")
    assert outcome.store is not None
    assert all(each["personal"] == each["generic"] for each in outcome.store.fingerprint.prompts)
    assert (recipe(outcome.file)["identifier"], recipe(outcome.file)["cut"]) == ("", 3)
    model = load(folders["sd21"])
    lora = load_lora(outcome.file, model.unet)  # type: ignore[arg-type]
    settings = SampleSettings(steps=2, size=(64, 64))
    (drawn,) = sample(model, ["a dog, in ink"], [0], settings, lora=lora)
    (plain,) = sample(model, ["a dog, in ink"], [0], settings)
    assert drawn.tobytes() != plain.tobytes()


def test_captions_change_from_record_to_record(folders: dict[str, Path], photos: Path) -> None:
    for number in range(3):
        (photos / f"{number}.txt").write_text("a sks dog, grass, sun, ball")
    changes = CaptionChanges(dropout=0.2, shuffle_tags=True)
    request = ask(photos, captions=changes, setting={"samples": 60})
    examples = make_examples(load(folders["sd21"]), request, [])
    assert len(examples) == 60
    assert {example.personal_prompt for example in examples} > {"", "a sks dog, sun, grass, ball"}
    assert all(e.generic_prompt == e.personal_prompt.replace("sks ", "") for e in examples)
    assert len({id(example.latents) for example in examples}) == 3
    again = make_examples(load(folders["sd21"]), request, [])
    assert [e.personal_prompt for e in again] == [e.personal_prompt for e in examples]


@pytest.mark.slow
def test_each_picture_sees_all_time_steps_under_changing_captions(
    folders: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    for number in range(3):
        (photos / f"{number}.txt").write_text("a sks dog, grass, sun, ball")
    request = ask(photos, captions=CaptionChanges(shuffle_tags=True), setting={"samples": 60, "cut": None})
    store = run(folders["sd21"], request, tmp_path / "out").store
    assert store is not None
    shown: dict[str, list[int]] = {}
    for record in store.records:
        shown.setdefault(store.fingerprint.latents[record.image], []).append(record.timestep)
    assert {len(times) for times in shown.values()} == {20}
    for times in shown.values():
        assert all(any(low <= time < low + 100 for time in times) for low in range(0, 1000, 100))


@pytest.mark.slow
def test_files_along_the_way_are_whole_and_the_last_are_kept(
    folders: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    request = ask(photos, training={"steps": 10}, name="my dog", keep=2)
    outcome = run(folders["sd21"], request, tmp_path / "out")
    assert outcome.file == tmp_path / "out" / "my dog.safetensors"
    along = sorted(path.name for path in outcome.file.parent.glob("my dog-*"))
    assert along == ["my dog-000008.safetensors", "my dog-000010.safetensors"]
    assert same(content(outcome.file), content(tmp_path / "out" / along[1]))
    shorter = ask(photos, training={"steps": 8}, name="my dog")
    expected = run(folders["sd21"], shorter, tmp_path / "shorter")
    assert same(content(expected.file), content(tmp_path / "out" / along[0]))
    assert recipe(tmp_path / "out" / along[0]) == recipe(outcome.file)
    for name in (
        "my dog-000000",
        "my dog-000001",
        "my dog-000002",
        "my dog-000900",
        "my dog-20260101000000",
        "my dog-best",
    ):
        (tmp_path / "out" / f"{name}.safetensors").touch()
    keep_last(tmp_path / "out" / "my dog-000008.safetensors", 3)
    left = {path.stem.removeprefix("my dog-") for path in (tmp_path / "out").glob("my dog-*")}
    assert left == {
        "000001",
        "000002",
        "000008",
        "000010",
        "000900",
        "20260101000000",
        "best",
    }  # of another run, or no step
    without = run(folders["sd21"], replace(request, keep=0), tmp_path / "without")
    assert list((tmp_path / "without").glob("my dog-*")) == []
    assert same(content(without.file), content(outcome.file))


@pytest.mark.slow
def test_held_out_pictures_tell_without_teaching(folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """And an interrupted run has the same course of them."""
    held_out = load_images(photos, 256)[2:]
    images = load_images(photos, 256)[:2]
    training = {"validate_every": 3, "steps": 8}
    without = run(folders["sd21"], ask(photos, images=images, training=training), tmp_path / "without")
    request = ask(photos, images=images, held_out=held_out, training=training)
    told: list[float | None] = []
    whole = run(
        folders["sd21"],
        request,
        tmp_path / "with",
        progress=lambda stage, done: told.append(done.validation) if stage == "train" else None,
    )
    assert same(content(without.file), content(whole.file))
    assert whole.result is not None
    steps, losses = zip(*whole.result.validation, strict=True)
    assert steps == (0, 3, 6, 8)
    assert told == [losses[0]] * 2 + [losses[1]] * 3 + [losses[2]] * 3
    assert len(set(losses)) == 4

    asked = iter([False] * 4 + [True] * 9)
    stopped = ask(photos, images=images, held_out=held_out, training=training)
    store = Store.open(tmp_path / "with" / "store")
    assert [record.timestep for record in store.records if record.kind == "held-out image"] == [125, 375, 625, 875]
    assert HELD_OUT_LOOKS == 4
    run(folders["sd21"], stopped, tmp_path / "again")
    (tmp_path / "again" / "checkpoint.safetensors").unlink()
    (tmp_path / "again" / "lora.safetensors").unlink()
    run(folders["sd21"], stopped, tmp_path / "again", stop=lambda: next(asked))
    again = run(folders["sd21"], stopped, tmp_path / "again")
    assert again.result is not None
    assert [loss for step, loss in again.result.validation if step in steps] == list(losses)
    assert (tmp_path / "again" / "loss.png").exists()


@pytest.mark.slow
def test_what_a_mask_hides_is_not_learned(folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """The gradient is that of the loss on the latents it shows alone; of a mask that shows all, that without one."""
    base: BaseModel = load(folders["sd21"])
    image = load_images(photos, 256)[0]
    white, left = Image.new("L", image.picture.size, 255), Image.new("L", image.picture.size)
    left.paste(255, (0, 0, 160, 192))
    loras = {}
    for name, mask in {"none": None, "white": white, "left": left}.items():
        request = ask(photos, images=[image._replace(mask=mask)], training={"steps": 1})
        loras[name] = content(run(folders["sd21"], request, tmp_path / name).file)
    assert same(loras["none"], loras["white"])
    assert not same(loras["none"], loras["left"])
    request = ask(photos, images=[image._replace(mask=left)])
    (example,) = make_examples(base, request, [])
    assert example.mask is not None
    assert example.mask.shape == (1, 1, 24, 40)
    assert example.mask[..., :20].min() == 1
    assert example.mask[..., 20:].max() == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"setting": {"patches": 192}}, "Patches of 192 pixels are not smaller than a picture of 320×192."),
        ({"setting": {"patches": 100}}, "The side of patches, 100, is no multiple of 8 pixels."),
        (
            {"setting": {"patches": 128, "low_resolution": 64}},
            "Patches of 128 pixels stand in for small pictures of 64.",
        ),
        ({"class_word": ""}, "0.png has no caption, and nothing says what it shows. Give a class word"),
        ({"name": "a/b"}, "cannot be called 'a/b'. Give the name of a file"),
        ({"name": ""}, "cannot be called ''"),
        ({"name": ".."}, "cannot be called '..'"),
        ({"name": "Checkpoint"}, "cannot be called 'Checkpoint': so is the state of the training. Give another"),
        ({"name": "dog.safetensors"}, "Leave .safetensors out"),
        ({"keep": -1}, "-1 files cannot be kept. Give 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(photos: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(HollowError) as refused:
        ask(photos, **more).check()
    assert said in str(refused.value)


def test_a_caption_without_the_identifier_says_how_styles_go(photos: Path) -> None:
    (photos / "1.txt").write_text("a dog on the moon")
    with pytest.raises(HollowError, match=r"lacks the identifier 'sks'.*or learn a style or a concept with an empty"):
        ask(photos).check()
    ask(photos, identifier="").check()


def test_an_empty_identifier_counts_in_folders_that_say_one(tmp_path: Path) -> None:
    """As people have a style: kohya's folder with one word, captions that do not hold it."""
    folder = tmp_path / "5_watercolor"
    folder.mkdir()
    Image.new("RGB", (256, 256)).save(folder / "a.png")
    (folder / "a.txt").write_text("a boat on the sea, watercolor painting")
    images = load_pictures(tmp_path, 256).images
    style = ask(tmp_path, images=images, class_word="", identifier="")
    style.check()
    assert style.subject == ("", "")
    assert style.generic_prompt(style.personal_prompt(images[0])) == "a boat on the sea, watercolor painting"


def test_words_that_the_lora_could_not_be_called_by_are_refused_at_once(photos: Path) -> None:
    images = [image._replace(caption="a cat on the moon") for image in load_images(photos, 256)]
    with pytest.raises(HollowError, match="The identifier and the class word are both 'cat'"):
        ask(photos, images=images, class_word="cat", identifier="cat").check()


def test_a_picture_of_one_of_several_classes_must_say_of_which(photos: Path) -> None:
    subjects = [Subject("sks", "dog"), Subject("xyz", "cat")]
    images = [image._replace(subject=each) for image, each in zip(load_images(photos, 256), subjects, strict=False)]
    of_class = load_images(photos, 256)[2:]
    with pytest.raises(HollowError, match=r"but of which: dog or cat\? Put it into a folder named 1_dog"):
        ask(photos, images=images, class_pictures=of_class).check()
    ask(photos, images=images[:1], class_pictures=of_class).check()


def patched(model: BaseModel, request: Request, drawn: Any = ()) -> tuple[list[Example], list[Record]]:
    examples = make_examples(model, request, drawn)
    records = plan_for(examples, request.setting.samples, model.schedule, 0)
    return patch_examples(model, request, examples, records, drawn)


def test_each_record_has_a_patch_of_its_own(folders: dict[str, Path], photos: Path) -> None:
    """The larger the more noise, at the same place for the same seed; held-out pictures, class pictures, captions and
    masks go along. SDXL is told where it is."""
    images = load_images(photos, 256)
    mask = Image.new("L", images[0].picture.size)
    mask.paste(255, (0, 0, 100, 192))
    drawn = torch.randn(1, 4, 24, 40, generator=torch.Generator().manual_seed(0))
    request = ask(
        photos,
        images=[images[0]._replace(mask=mask), *images[1:]],
        class_pictures=images[1:2],
        held_out=images[2:],
        setting={"patches": 128, "class_images": 1},
    )
    model = load(folders["sdxl"])
    examples, records = patched(model, request, [drawn])
    assert [record.image for record in records] == list(range(len(examples))) == list(range(12 + HELD_OUT_LOOKS))
    assert [record.kind for record in records] == [example.kind for example in examples]
    assert {example.latents.shape for example in examples} == {(1, 4, 16, 16)}
    assert sum(example.mask is not None for example in examples) == 2  # of six records of three pictures
    for record, example in zip(records, examples, strict=True):
        assert example.personal.time_ids is not None
        height, width, top, _, *target = example.personal.time_ids[0].tolist()
        assert target == [128, 128]
        assert example.personal.place is None  # convolutions know no places
        shorter = {(192, 320): 192, (200, 330): 192, (200, 200): 256, (330, 200): 192}[height, width]
        side = 128 + round(record.timestep / 999 * (shorter - 128) / 8) * 8
        assert 0 <= top <= {192: 320, 256: 256}[shorter] * 128 / side - 128 + 2  # twice rounded
    again, _ = patched(model, request, [drawn])
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(examples, again, strict=True))
    prior = [example.personal_prompt for example in examples if example.kind == "prior"]
    assert set(prior) == {"a photo of a dog"}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["bp", "selective"])
def test_patches_go_the_whole_road(folders: dict[str, Path], photos: Path, tmp_path: Path, strategy: str) -> None:
    """Interrupted, it ends as it would."""
    for number in range(3):
        (photos / f"{number}.txt").write_text("a sks dog, grass, sun")
    request = ask(
        photos,
        held_out=[image._replace(path=None) for image in load_images(photos, 256)[1:2]],
        captions=CaptionChanges(shuffle_tags=True),
        training={"strategy": strategy, "together": 2, "batch": 2, "selective_gamma": 0.5},
        setting={"patches": 128, "class_images": 2},
    )
    outcome = run(folders["sd21"], request, tmp_path / "whole")
    assert outcome.store is not None
    sizes = {kind: set() for kind in ("image", "prior", "low image", "low prior", "held-out image")}
    for index, record in enumerate(outcome.store.records):
        sizes[record.kind].add(tuple(outcome.store.inputs(record.image)[0].shape[-2:]))
        assert outcome.store.record(index).stored
    small = {(16, 16)}
    if strategy == "bp":
        assert sizes == {
            "image": small,
            "prior": small,
            "low image": set(),
            "low prior": set(),
            "held-out image": small,
        }
    else:
        assert sizes["low image"] == sizes["low prior"] == small
        assert sizes["image"] == {(24, 40), (32, 32), (40, 24)}
        assert sizes["held-out image"] == {(32, 32)}
        twins = [[outcome.store.records[i] for i in outcome.store.indices(kind)] for kind in ("image", "low image")]
        for full, low in zip(*twins, strict=True):
            assert (full.timestep, full.noise_seed) == (low.timestep, low.noise_seed)
            prompts = outcome.store.fingerprint.prompts
            assert prompts[full.image] == prompts[low.image]

    left = [90]  # behind the class pictures, which ask at each step

    def stop() -> bool:
        left[0] -= 1
        return left[0] < 0

    run(folders["sd21"], request, tmp_path / "stopped", stop=stop)
    again = run(folders["sd21"], request, tmp_path / "stopped")
    assert same(content(outcome.file), content(again.file))
    other = replace(request, setting=replace(request.setting, patches=64))
    beside = run(folders["sd21"], other, tmp_path / "stopped")
    assert beside.file is not None
    assert beside.file.parent.name.startswith("pictures-")
    assert same(content(outcome.file), content(again.file))
