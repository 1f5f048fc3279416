"""The whole road on a tiny model: what a user gets, and that an interruption anywhere changes nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors import safe_open
from tiny_pipelines import shallow_pipeline, tiny_pipeline
from tiny_training import OutOfMemoryAt, same
from tiny_training import content as tree
from tiny_unets import make_shallow_unet

from hollow_core.data.folders import check_outside
from hollow_core.data.images import TrainingImage, load_images
from hollow_core.errors import HollowError
from hollow_core.files import read_safetensors, write_safetensors
from hollow_core.lora import file as lora_file
from hollow_core.lora.layers import add_lora, lora_state
from hollow_core.lora.metadata import recipe_for
from hollow_core.memory.setting import Setting
from hollow_core.models.base_model import BaseModel, load
from hollow_core.nets.unet import UNet
from hollow_core.nets.unet_layers import check_config
from hollow_core.progress import Progress
from hollow_core.request import Request
from hollow_core.road import Outcome, personalize
from hollow_core.sampling.prior import class_latents
from hollow_core.training.precompute import model_id
from hollow_core.training.settings import TrainSettings


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    shallow_pipeline("sd21").save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (160 + 20 * number, 200), color).save(folder / f"{number}.png")
    return folder


def ask(photos: Path, *, images: list[TrainingImage] | None = None, thumbnail: bool = False, **setting: Any) -> Request:
    images = load_images(photos, 128, square=True) if images is None else images
    training = TrainSettings(rank=2, steps=6, save_every=2)
    return Request(
        images, "dog", setting=Setting(**{"samples": 12, "training": training} | setting), thumbnail=thumbnail
    )


def changed(request: Request, **setting: Any) -> Request:
    return replace(request, setting=replace(request.setting, **setting))


def content(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as lora:
        return {name: lora.get_tensor(name) for name in list(lora.keys())}


class Interrupted(Exception):
    pass


@pytest.mark.slow
def test_interrupted_at_any_stage_it_ends_with_the_same_lora(model_folder: Path, photos: Path, tmp_path: Path) -> None:
    request = ask(photos, class_images=2)
    whole = personalize(lambda: load(model_folder), request, tmp_path / "whole")
    expected = content(whole.file)

    moments: list[tuple[str, int]] = []
    personalize(
        lambda: load(model_folder), request, tmp_path / "seen", progress=lambda s, p: moments.append((s, p.step))
    )
    assert {stage for stage, _ in moments} == {"class pictures", "precompute", "train"}
    first_and_middle = [moment for moment in moments if moment[1] in (1, 5)]
    for moment in [*first_and_middle, moments[-1]]:

        def interrupt(stage: str, done: Progress, moment: tuple[str, int] = moment) -> None:
            if (stage, done.step) == moment:
                raise Interrupted

        folder = tmp_path / f"{moment[0]}-{moment[1]}"
        with pytest.raises(Interrupted):
            personalize(lambda: load(model_folder), request, folder, progress=interrupt)
        again = personalize(lambda: load(model_folder), request, folder)
        found = content(again.file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), moment


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["class pictures", "precompute", "train"])
def test_a_stop_is_obeyed_and_run_again_it_goes_on(
    model_folder: Path, photos: Path, tmp_path: Path, stage: str
) -> None:
    request = ask(photos, class_images=2)
    expected = content(personalize(lambda: load(model_folder), request, tmp_path / "whole").file)
    seen: list[str] = []
    stopped = personalize(
        lambda: load(model_folder),
        request,
        tmp_path / "stopped",
        progress=lambda name, done: seen.append(name),
        stop=lambda: stage in seen,
    )
    assert seen.count(stage) == 1
    assert (stopped.file is not None) == (stage == "train")  # what was trained is kept
    found = content(personalize(lambda: load(model_folder), request, tmp_path / "stopped").file)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_out_of_memory_is_told_with_what_to_change_and_so_it_goes_on(
    model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    request = ask(photos, cut=1, class_images=2)
    expected = content(personalize(lambda: load(model_folder), request, tmp_path / "whole").file)
    checkpointing = replace(request.setting.training, gradient_checkpointing=True)
    drawn = 2 * 30  # calls for the pictures of the class
    for stage, calls, lever, change in (
        ("encode", 40, "streaming", {"streaming": True}),
        ("precompute", drawn + 10, "a streamed middle", {"stream_middle": True}),
        ("train", drawn + 12 + 4, "gradient checkpointing", {"training": checkpointing}),
    ):

        def load_onto_a_full_device(calls: int = calls) -> BaseModel:
            model = load(model_folder)
            model.unet.down_blocks[0].register_forward_hook(OutOfMemoryAt(calls))  # which all stages run
            return model

        said = rf"in the stage {stage}: 0.0\d GiB were predicted, \S+ GiB are free now\. Take {lever}: then it is"
        with pytest.raises(HollowError, match=said):
            personalize(load_onto_a_full_device, request, tmp_path / stage)
        assert (tmp_path / stage / "checkpoint.safetensors").exists() == (stage == "train")
        assert len(list((tmp_path / stage / "class").iterdir())) == (1 if stage == "encode" else 2)
        taken = changed(request, **change)
        found = content(personalize(lambda: load(model_folder), taken, tmp_path / stage).file)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_prompts_and_cut_are_in_the_file_and_captions_are_used(
    model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "0.txt").write_text("a sks dog on the moon")
    metadata = {}
    for thumbnail in (False, True):
        before = metadata
        outcome = personalize(lambda: load(model_folder), ask(photos, thumbnail=thumbnail), tmp_path / "out")
        with safe_open(outcome.file, "pt") as lora:
            metadata = lora.metadata()
    assert metadata.keys() - before.keys() == {"modelspec.thumbnail"}
    assert json.loads(metadata["hollow.cut"]) == 3
    assert json.loads(metadata["hollow.generic_prompt"]) == "a photo of a dog"
    prompts = json.loads((tmp_path / "out" / "store" / "store.json").read_text())["fingerprint"]["prompts"]
    assert prompts[0] == {"personal": "a sks dog on the moon", "generic": "a dog on the moon"}
    assert prompts[1] == {"personal": "a photo of a sks dog", "generic": "a photo of a dog"}


def test_a_caption_without_the_identifier_is_refused(model_folder: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "1.txt").write_text("a dog on the moon")
    with pytest.raises(HollowError, match=r"The caption of .*1\.png, 'a dog on the moon', lacks the identifier 'sks'"):
        personalize(lambda: load(model_folder), ask(photos), tmp_path / "out")


def test_what_the_request_tells_is_refused_before_the_model_loads(tmp_path: Path, photos: Path) -> None:
    def load_nothing() -> BaseModel:
        raise AssertionError

    fused = TrainSettings(fused_backward=True, max_grad_norm=float("inf"))
    for refused, said in [
        (ask(photos, images=[], class_images=2), "no pictures to learn from"),
        (ask(photos, class_images=2, training=fused), "there are pictures of the class too"),
        (ask(photos, low_resolution=128, training=TrainSettings(strategy="selective")), "not below the pictures' 128"),
        (
            ask(photos, resolution=512),
            "is 128×128 pixels, but the setting's resolution is 512",
        ),
        (ask(photos, samples=1, class_images=2), "1 records are too few. Ask for at least 2"),
    ]:
        with pytest.raises(HollowError, match=said):
            personalize(load_nothing, refused, tmp_path / "out")


@pytest.mark.parametrize(
    ("cut", "said"), [(6, "Cut 6 leaves no attention to put a LoRA on. Choose a cut from 0 to 5"), (9, "no cut 9")]
)
def test_a_cut_that_cannot_be_trained_is_refused_before_anything_is_drawn(
    photos: Path, tmp_path: Path, cut: int, said: str
) -> None:
    tiny_pipeline("sdxl").save_pretrained(tmp_path / "model")
    with pytest.raises(HollowError, match=said):
        personalize(lambda: load(tmp_path / "model"), ask(photos, cut=cut, class_images=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_class_pictures_of_another_model_are_not_taken(model_folder: Path, photos: Path, tmp_path: Path) -> None:
    """And one that is missing between others is drawn again."""
    told: list[Progress] = []

    def run(base: Path) -> None:
        model = load(base)
        told.clear()
        folder, made_by = tmp_path / "class", model_id(model.network)
        class_latents(model, [("a dog", (128, 128))] * 4, folder, made_by=made_by, steps=1, progress=told.append)

    run(model_folder)
    (tmp_path / "class" / "class-00001.safetensors").unlink()
    (tmp_path / "class" / "class-00002.safetensors").unlink()
    run(model_folder)
    assert [(done.step, done.steps) for done in told] == [(3, 4), (4, 4)]
    assert all(done.seconds_left >= 0 for done in told)
    tiny_pipeline("sd15").save_pretrained(tmp_path / "other")
    run(tmp_path / "other")
    assert [done.step for done in told] == [1, 2, 3, 4]
    for base in (model_folder, tmp_path / "other"):  # both stay
        run(base)
        assert told == []


def not_finite(path: Path) -> None:
    """As versions that kept whatever was drawn left it."""
    write_safetensors(path, {"latents": read_safetensors(path)[0]["latents"] * torch.nan})


def of_another_shape(path: Path) -> None:
    write_safetensors(path, {"latents": torch.zeros(1, 4, 8, 8)})


def without_latents(path: Path) -> None:
    write_safetensors(path, {"numbers": torch.zeros(3)})


def one_bit_flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_class_pictures_that_are_damaged_are_named_and_drawn_again(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(model_folder)
    made_by = model_id(model.network)

    def run() -> list[torch.Tensor]:
        return class_latents(model, [("a dog", (128, 128))] * 2, tmp_path, made_by=made_by, steps=1)

    whole, damages = run(), (not_finite, of_another_shape, without_latents, one_bit_flipped, Path.touch)
    for damage in damages:
        caplog.clear()
        damage(tmp_path / "class-00001.safetensors")
        found = run()
        assert all(torch.equal(*pair) for pair in zip(found, whole, strict=True)), damage
        assert ("class-00001.safetensors is damaged. It is drawn again." in caplog.text) == (damage is not Path.touch)


def test_class_pictures_that_are_not_finite_are_told_and_not_kept(model_folder: Path, tmp_path: Path) -> None:
    model = load(model_folder)
    model.unet.conv_out.bias.data.fill_(torch.nan)
    said = r"class-00000\.safetensors, 'a dog', is not finite as the model draws it in float32\. Take another precision"
    with pytest.raises(HollowError, match=said):
        class_latents(model, [("a dog", (128, 128))], tmp_path, made_by="it", steps=1)
    assert list(tmp_path.iterdir()) == []


def test_class_pictures_drawn_together_are_what_each_would_be_alone(model_folder: Path, tmp_path: Path) -> None:
    """Those that are missing, whichever they are."""
    model, prompts = load(model_folder), ["a dog", "a dog on the moon", "a dog", "a dog"]
    asked_of = [(prompt, (128, 128)) for prompt in prompts]
    asked: dict[str, Any] = {"made_by": model_id(model.network), "steps": 2}
    alone = class_latents(model, asked_of, tmp_path / "alone", **asked)
    class_latents(model, asked_of[:1], tmp_path / "three", **asked)
    together = class_latents(model, asked_of, tmp_path / "three", together=3, **asked)
    for mine, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)


def test_class_pictures_differ_from_the_subjects_by_the_identifier_alone(
    model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    """Otherwise the LoRA can tell them apart without listening to the identifier."""
    for number, scene in enumerate(("the moon", "a beach", "a street")):
        (photos / f"{number}.txt").write_text(f"a sks dog on {scene}")
    personalize(lambda: load(model_folder), ask(photos, class_images=4), tmp_path / "out")
    fingerprint = json.loads((tmp_path / "out" / "store" / "store.json").read_text())["fingerprint"]
    generic = ["a dog on the moon", "a dog on a beach", "a dog on a street"]
    of_class = [prompt["generic"] for prompt in fingerprint["prompts"][len(generic) :]]
    assert of_class == [*generic, generic[0]]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_the_middle_is_out_of_memory_while_training(
    model_folder: Path, photos: Path, tmp_path: Path, streaming: bool
) -> None:
    import gc
    import weakref

    gone: list[weakref.ref[torch.nn.Module]] = []
    kept: list[weakref.ref[torch.nn.Module]] = []

    def watched() -> BaseModel:
        model = load(model_folder)
        gone.extend(weakref.ref(part) for part in (model.unet, model.unet.mid_block, model.unet.down_blocks[1]))
        gone.append(weakref.ref(model.unet.mid_block.resnets[0].conv1))
        gone.extend(weakref.ref(part) for part in (model.vae, *model.text_encoders))
        kept.append(weakref.ref(model.unet.down_blocks[0]))
        return model

    alive: list[int] = []

    def count(stage: str, done: Progress) -> None:
        if stage == "train":
            gc.collect()
            alive.append(sum(part() is not None for part in gone))
            assert kept[0]() is not None

    loader: Callable[[], BaseModel] = watched
    personalize(loader, ask(photos, cut=1, streaming=streaming), tmp_path / "out", progress=count)
    assert alive == [0] * 6


def test_parts_visit_the_device_in_turn(model_folder: Path, photos: Path, tmp_path: Path) -> None:
    """The device goes by another name of the CPU here, so that to arrive is not to leave."""
    moves: list[tuple[str, str]] = []

    def watched(name: str, part: torch.nn.Module) -> None:
        really = part.to

        def to(device: object) -> torch.nn.Module:
            moves.append((name, str(device)))
            return really(device)

        part.to = to

    def loader() -> BaseModel:
        model = load(model_folder)
        for name, part in (("unet", model.unet), ("vae", model.vae), ("text", model.text_encoders[0])):
            watched(name, part)
        return model

    personalize(loader, ask(photos, samples=4), tmp_path / "out", device="cpu:0")
    encode = [("vae", "cpu:0"), ("vae", "cpu"), ("text", "cpu:0"), ("text", "cpu")]
    assert moves[: len(encode)] == encode
    assert {name for name, _ in moves[len(encode) :]} == {"unet"}


@pytest.mark.slow
def test_small_and_away_the_road_is_walked_with_one_base_and_streaming_changes_nothing(
    model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    files = {}
    for bits in (None, 8):
        request = ask(photos, class_images=1, samples=4, base_bits=bits)
        resident = personalize(lambda: load(model_folder), request, tmp_path / f"{bits}")
        streamed = personalize(
            lambda: load(model_folder), changed(request, streaming=True), tmp_path / f"{bits} streamed"
        )
        assert resident.store.id == streamed.store.id
        files[bits] = content(resident.file)
        assert all(torch.equal(tensor, files[bits][name]) for name, tensor in content(streamed.file).items())
    assert files[8].keys() == files[None].keys()
    assert not any(torch.equal(files[8][name], files[None][name]) for name in files[8] if "lora_up" in name)
    there = tree(tmp_path / "8")
    beside = personalize(lambda: load(model_folder), ask(photos, class_images=1, samples=4), tmp_path / "8")
    assert beside.file.parent.name.startswith("model-")
    assert same(content(beside.file), files[None])
    assert there.items() <= tree(tmp_path / "8").items()


def seen(folder: Path, request: Request, out: Path) -> tuple[Outcome, set[str]]:
    """What came of it, and the stages in which something was made."""
    stages: set[str] = set()
    return personalize(lambda: load(folder), request, out, progress=lambda stage, _: stages.add(stage)), stages


@pytest.mark.slow
def test_with_other_settings_it_goes_beside_the_first_with_what_still_fits(
    model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    """As it would in a folder of its own, interrupted or not; and nothing that was there is touched."""
    request = ask(photos, class_images=2)
    out, training = tmp_path / "out", request.setting.training
    first, _ = seen(model_folder, request, out)
    assert first.file == out / "lora.safetensors"
    images = load_images(photos, 128, square=True)
    tries = {
        "rank-4": (changed(request, training=replace(training, rank=4)), {"train"}),
        "steps-4": (changed(request, training=replace(training, steps=4)), {"train"}),
        "cut-1": (changed(request, cut=1), {"precompute", "train"}),
        "weight_decay-0.1-seed-1": (
            changed(request, training=replace(training, seed=1, weight_decay=0.1)),
            {"class pictures", "precompute", "train"},
        ),
        "captions": (
            replace(request, images=[*images[:2], images[2]._replace(caption="a sks dog at sea")]),
            {"precompute", "train"},
        ),
        "pictures": (replace(request, images=images[:2]), {"precompute", "train"}),
    }
    loras = {}
    for name, (other, made) in tries.items():
        before = tree(out)
        done, stages = seen(model_folder, other, out)
        assert done.file is not None
        assert (done.file.parent.parent, done.file.name) == (out, "lora.safetensors")
        assert done.file.parent.name.startswith(f"{name}-")
        assert stages == made, name
        assert before.items() <= tree(out).items(), name
        loras[name] = done.file
        if name in ("rank-4", "captions"):
            alone = personalize(lambda: load(model_folder), other, tmp_path / name)
            assert same(content(done.file), content(alone.file)), name
    for name in ("steps-4", "captions"):  # each goes on where it was
        before = tree(out)
        done, stages = seen(model_folder, tries[name][0], out)
        assert (done.file, stages) == (loras[name], set())
        own = loras[name].parent.name  # where the LoRA is written again
        others = {file: there for file, there in before.items() if not file.startswith(own)}
        assert others.items() <= tree(out).items()
        assert tree(out).keys() == before.keys()
    more, stages = seen(model_folder, changed(request, training=replace(training, steps=8)), out)
    assert (more.file, stages) == (first.file, {"train"})


@pytest.mark.slow
def test_interrupted_beside_the_first_it_goes_on_there(model_folder: Path, photos: Path, tmp_path: Path) -> None:
    """Even where others were tried meanwhile, and where the first never came to train."""
    request = ask(photos, class_images=1)
    other = changed(request, training=replace(request.setting.training, seed=1))
    whole = {
        name: personalize(lambda: load(model_folder), each, tmp_path / name)
        for name, each in (("1", request), ("2", other))
    }
    out = tmp_path / "out"
    for stage, step in (("class pictures", 1), ("precompute", 9), ("train", 5)):
        for each in (request, other):

            def interrupt(name: str, done: Progress, moment: tuple[str, int] = (stage, step)) -> None:
                if (name, done.step) == moment:
                    raise Interrupted

            with pytest.raises(Interrupted):
                personalize(lambda: load(model_folder), each, out, progress=interrupt)
    for name, each in (("1", request), ("2", other)):
        done, stages = seen(model_folder, each, out)
        assert stages == {"train"}
        assert same(content(done.file), content(whole[name].file))
    assert len(list(out.rglob("lora.safetensors"))) == 2


@pytest.mark.slow
def test_a_folder_of_before_goes_on_and_keeps_what_it_has(model_folder: Path, photos: Path, tmp_path: Path) -> None:
    """Those without training.json: what they are of is in the checkpoint, or not known at all."""
    request, out = ask(photos), tmp_path / "out"
    other = changed(request, training=replace(request.setting.training, rank=4))
    first, _ = seen(model_folder, request, out)
    (out / "training.json").unlink()
    again, stages = seen(model_folder, request, out)
    assert (again.file, stages) == (first.file, set())
    (out / "training.json").unlink()
    assert seen(model_folder, other, out)[0].file.parent.name.startswith("rank-4-")
    for name in ("training.json", "checkpoint.safetensors"):
        (out / name).unlink(missing_ok=True)
    kept = first.file.read_bytes()
    unknown, _ = seen(model_folder, changed(request, samples=6), out)
    assert unknown.file.parent.name.startswith("samples-6-")
    assert first.file.read_bytes() == kept


def test_what_is_damaged_is_told_before_anything_is_trained(model_folder: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training.json").write_text("[]")
    with pytest.raises(HollowError, match=r"training\.json does not say what the training beside it is of\. Delete it"):
        personalize(lambda: load(model_folder), ask(photos, samples=1), tmp_path / "out")


def test_two_at_once_are_not_mixed(model_folder: Path, photos: Path, tmp_path: Path) -> None:
    """The second is refused while the first runs, and told who does."""
    said: list[str] = []

    def second(stage: str, done: Progress) -> None:
        program = (
            "import sys; from pathlib import Path; from hollow_core.errors import HollowError\n"
            "from hollow_core.lock import holding\n"
            "try:\n    with holding(Path(sys.argv[1])): pass\nexcept HollowError as error: print(error)"
        )
        if not said:
            said.append(subprocess.check_output([sys.executable, "-c", program, str(tmp_path / "out")], text=True))

    personalize(lambda: load(model_folder), ask(photos, samples=1, cut=None), tmp_path / "out", progress=second)
    assert f"is in use by process {os.getpid()} on " in said[0]
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_stop_is_obeyed_within_a_step_of_a_class_picture(model_folder: Path, photos: Path, tmp_path: Path) -> None:
    """And between pictures that are encoded; each is whole or not there."""
    request = ask(photos, class_images=2, samples=2)
    for asked in (3, 2 * 31 + 2):  # a picture asks before it and at its thirty steps
        left = [asked]

        def stop(left: list[int] = left) -> bool:
            left[0] -= 1
            return left[0] < 0

        outcome = personalize(lambda: load(model_folder), request, tmp_path / "out", stop=stop)
        assert outcome.file is None
        assert left == [-1]
        assert not (tmp_path / "out" / "store").exists()
    assert len(list((tmp_path / "out" / "class").iterdir())) == 2


@pytest.mark.parametrize("where", ["", "reg", "img/10_sks dog", "Class", "link"])
def test_the_pictures_folder_is_not_written_in(photos: Path, tmp_path: Path, where: str) -> None:
    """Nor one in it that is looked into: loss.png would be a picture of the dog."""
    if where == "link":
        (photos / "link").symlink_to(photos)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        HollowError, match=r"is a folder of your pictures, .*Choose another folder, such as .*photos-out"
    ):
        personalize(lambda: pytest.fail("loaded"), ask(photos), photos / where)
    assert sorted(tmp_path.rglob("*")) == before
    for outside in (photos / "my-lora", photos / "my-lora" / "class", tmp_path, tmp_path / "photos-lora"):
        check_outside(outside, photos)


def test_a_picture_has_one_part_to_play(photos: Path) -> None:
    images = load_images(photos, 128, square=True)
    for part, said in (
        ("class_pictures", "of the subject and of the class"),
        ("held_out", "of the subject and held out"),
    ):
        with pytest.raises(HollowError, match=rf"1\.png would be both {said}\. Give other pictures"):
            replace(ask(photos), **{part: images[1:2]}).check()
    with pytest.raises(HollowError, match="both of the class and held out"):
        replace(ask(photos, images=images[:1]), class_pictures=images[1:], held_out=images[2:]).check()


def test_what_no_file_could_hold_is_refused_before_anything_is_made(
    model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    def refusal(model: BaseModel, **training: Any) -> str:
        request = ask(photos, class_images=1, training=TrainSettings(rank=2, steps=6, **training))
        with pytest.raises(HollowError) as refused:
            personalize(lambda: model, request, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return str(refused.value)

    model = load(model_folder)
    assert "no layer 'attn3.to_q' to put a LoRA on" in refusal(model, targets=("attn3.to_q",))
    zero_snr = DDPMScheduler(rescale_betas_zero_snr=True)
    assert "zero terminal SNR cannot train on epsilon" in refusal(replace(model, scheduler=zero_snr))
    # as another tool may leave a module behind, for which the config has no word
    model.unet.up_blocks[-1].attentions[-1].add_module("to_q", torch.nn.Linear(8, 8))
    said = "up_blocks.1.attentions.1.to_q is no layer of this U-Net by its config"
    assert said in refusal(model)


@pytest.mark.parametrize(
    "config",
    [
        {"only_cross_attention": True},
        {"layers_per_block": [1, 2]},
        {"transformer_layers_per_block": [2, 1]},
        {"resnet_time_scale_shift": "scale_shift"},
        {"time_embedding_type": "fourier"},
        {"time_embedding_act_fn": "silu", "timestep_post_act": "silu"},
        {"conv_in_kernel": 5, "center_input_sample": True, "flip_sin_to_cos": False},
        {"cross_attention_norm": "layer_norm"},
    ],
)
def test_an_unusual_unet_that_is_let_through_goes_all_the_way(config: dict[str, Any], tmp_path: Path) -> None:
    network = UNet(make_shallow_unet("sd15", **config))
    check_config(network.config)
    latents, prompt = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), network.inputs(16, 16)[1]
    hollowed = network.hollow(1, [500])
    found = hollowed.predict(latents, [500], prompt, network.base(1)(latents, [500], prompt))
    torch.testing.assert_close(found, network.predict(latents, [500], prompt, {}))
    add_lora(hollowed.module, 2, targets=network.targets.all, generator=torch.Generator())
    file = tmp_path / "lora.safetensors"
    recipe = recipe_for(1, "sks", "dog", "epsilon")
    lora_file.save(file, lora_state(hollowed.module), network.config, alpha=2, layout="sd15", recipe=recipe)
    assert lora_file.load(file, network.module).state.keys() == lora_state(hollowed.module).keys()
