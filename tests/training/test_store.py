"""The record store: damage is told and mended, and a record is read by itself."""

import json
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_training import content, tiny_examples, tiny_schedule

from hollow_core.errors import HollowError
from hollow_core.files import digest
from hollow_core.nets.unet import EXIT_ACTIVATION, UNet
from hollow_core.training.precompute import precompute
from hollow_core.training.store import Store


@pytest.fixture
def make_store(tiny_unet, tmp_path):
    """A store of three shards; called again, it goes on with the same one."""

    def make() -> Store:
        unet = tiny_unet("sdxl")
        examples = tiny_examples(unet, images=2, priors=1)
        return precompute(UNet(unet), tiny_schedule(), examples, tmp_path / "store", cut=1, samples=20)

    return make


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_opened_it_is_the_store_that_was_made(make_store):
    made = make_store()
    opened = Store.open(made.folder)
    assert opened.records == made.records
    assert opened.fingerprint == made.fingerprint
    assert opened.id == made.id
    assert opened.size_bytes == sum(map(len, content(made.folder).values()))
    assert opened.indices("image") == list(range(10))
    assert opened.indices("prior") == list(range(10, 20))
    for index in range(20):
        assert torch.equal(opened.record(index).stored[EXIT_ACTIVATION], made.record(index).stored[EXIT_ACTIVATION])


def test_training_inputs_are_the_personal_prompt_for_images_and_the_generic_one_for_the_prior(make_store, tiny_unet):
    examples = tiny_examples(tiny_unet("sdxl"), images=2, priors=1)
    store = make_store()
    for image, prompt in enumerate([examples[0].personal, examples[1].personal, examples[2].generic]):
        latents, conditioning = store.inputs(image)
        assert torch.equal(latents, examples[image].latents)
        for mine, given in zip(conditioning, prompt, strict=True):
            assert mine is None if given is None else torch.equal(mine, given)


@pytest.mark.parametrize(
    "damage", [cut_in_half, lambda path: path.write_bytes(b""), lambda path: path.write_text("{}")]
)
def test_a_damaged_shard_is_told_and_made_anew_alone(make_store, damage, caplog):
    store = make_store()
    whole = content(store.folder)
    shard = store.folder / "records-00001.safetensors"
    damage(shard)
    said = r"records-00001\.safetensors is missing or damaged \(.*\)\. Precompute again: it is made anew"
    for read in (lambda: Store.open(store.folder), lambda: store.check(tiny_schedule()), lambda: store.record(9)):
        with pytest.raises(HollowError, match=said):
            read()
    assert store.record(7).stored
    assert make_store().missing == []
    assert re.search(r"records-00001\.safetensors is missing or damaged .* It is made anew", caplog.text)
    assert content(store.folder) == whole


def test_a_shard_of_another_place_is_told(make_store):
    store = make_store()
    (store.folder / "records-00001.safetensors").write_bytes((store.folder / "records-00000.safetensors").read_bytes())
    with pytest.raises(HollowError, match=r"records-00001\.safetensors does not hold what its store\.json says"):
        Store.open(store.folder)


def flip_a_bit(path):
    """The last of a file, which is one of its numbers."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit, Path.unlink])
def test_damaged_inputs_are_told_and_made_anew(make_store, damage):
    store = make_store()
    whole = content(store.folder)
    damage(store.folder / "inputs.safetensors")
    said = r"inputs\.safetensors (is missing or damaged|does not hold what was written).* Precompute again"
    with pytest.raises(HollowError, match=said):
        store.check(tiny_schedule())
    make_store()
    assert content(store.folder) == whole


def of_another_store(path):
    """The same keys and shapes."""
    save_file({key: tensor + 1 for key, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("damage", [flip_a_bit, of_another_store])
def test_a_record_that_is_not_the_one_that_was_written_is_told_and_made_anew(make_store, damage, caplog):
    store = make_store()
    whole = content(store.folder)
    damage(store.folder / "records-00001.safetensors")
    said = r"records-00001\.safetensors does not hold what was written\."
    with pytest.raises(HollowError, match=f"{said} Precompute again"):
        Store.open(store.folder).check(tiny_schedule())
    assert make_store().missing == []
    assert re.search(f"{said} It is made anew", caplog.text)
    assert content(store.folder) == whole


def edit(folder, change):
    index = json.loads((folder / "store.json").read_text())
    change(index)
    (folder / "store.json").write_text(json.dumps(index))


def as_version_0_1_wrote(index):
    del index["id"], index["digests"]


def test_a_store_without_digests_is_read_and_gone_on_with(make_store):
    """As older versions left them."""
    store = make_store()
    whole = content(store.folder)
    edit(store.folder, as_version_0_1_wrote)
    (store.folder / "records-00001.safetensors").unlink()
    make_store().check(tiny_schedule())
    digests = json.loads((store.folder / "store.json").read_text())["digests"]
    assert digests == {"1": json.loads(whole.pop("store.json"))["digests"]["1"]}
    assert whole.items() <= content(store.folder).items()


EDITED = [
    (lambda index: index["records"][3].update(timestep=-1), "the timestep of record 3 is '-1'"),
    (lambda index: index["records"][3].update(timestep="5"), "the timestep of record 3 is '5'"),
    (lambda index: index["records"][3].update(timestep=True), "the timestep of record 3 is 'True'"),
    (lambda index: index["records"][3].update(timestep=5.5), "the timestep of record 3 is '5.5'"),
    (lambda index: index["records"][3].update(image=3), "the image of record 3 is '3'"),
    (lambda index: index["records"][3].update(image=2), "record 3 and its example are of different kinds"),
    (lambda index: index["records"][3].update(noise_seed=2**32), "the noise_seed of record 3 is"),
    (lambda index: index["records"][3].update(kind="picture"), "the kind of record 3 is 'picture'"),
    (lambda index: index["records"][3].update(kind=[]), "the kind of record 3 is"),
    (lambda index: index["records"][3].pop("kind"), r"\(KeyError\('kind'\)\)"),
    (lambda index: index["records"].insert(3, 7), "TypeError"),
    (lambda index: index.update(records=[]), "there are no records of images"),
    (lambda index: index.update(records=index["records"][10:]), "there are no records of images"),
    (lambda index: index.update(fingerprint=[]), "TypeError"),
    (lambda index: index["fingerprint"].update(kinds=["image", "image", "low prior"]), "of different kinds"),
    (lambda index: index["fingerprint"].update(latents=7), "its latents is '7'"),
    (lambda index: index["fingerprint"]["latents"].pop(), "it has 3 examples, but 2 latents"),
    (lambda index: index["fingerprint"].update(masks=["a"]), "it has 3 examples, but 1 masks"),
    (lambda index: index["fingerprint"].update(cut="3"), "its cut is '3'"),
    (lambda index: index["fingerprint"].update(more=1), "TypeError"),
    (lambda index: index["fingerprint"]["embeddings"][0]["personal"].clear(), "prompt of example 0 is not embedded"),
    (lambda index: index["fingerprint"]["embeddings"][0]["personal"].update(x="y"), "of example 0 is not embedded"),
    (lambda index: index["fingerprint"]["embeddings"][1].pop("generic"), "KeyError"),
    (lambda index: index.update(digests=["a"]), "its digests are no text"),
    (lambda index: index.update(digests={"one": "a"}), "invalid literal"),
]


def test_an_edited_index_is_told(make_store):
    folder = make_store().folder
    for old in (False, True):
        if old:
            edit(folder, as_version_0_1_wrote)
        before = (folder / "store.json").read_text()
        for change, said in EDITED:
            (folder / "store.json").write_text(before)
            edit(folder, change)
            with pytest.raises(HollowError, match=said) as told:
                Store.open(folder)
            assert "store.json is no index of a record store (" in str(told.value)
            assert str(told.value).endswith("Delete its folder and precompute anew.")


def test_an_edited_time_step_is_told(make_store):
    folder = make_store().folder
    edit(folder, lambda index: index["records"][3].update(timestep=1000))
    with pytest.raises(HollowError, match=r"store\.json was changed since it was made\. Delete its folder"):
        make_store()
    edit(folder, as_version_0_1_wrote)
    for read in (make_store, lambda: Store.open(folder).check(tiny_schedule())):
        with pytest.raises(HollowError, match=r"store\.json has record 3 at the time step 1000, but the last is 999\."):
            read()


def test_an_index_that_could_be_but_is_not_what_was_written_is_told(make_store):
    folder = make_store().folder
    before = (folder / "store.json").read_text()
    for change in (
        lambda index: index["records"][3].update(timestep=index["records"][3]["timestep"] ^ 1),
        lambda index: index["records"][3].update(noise_seed=index["records"][3]["noise_seed"] ^ 1),
        lambda index: index["fingerprint"].update(samples=21),
        lambda index: index.update(id=7),
    ):
        (folder / "store.json").write_text(before)
        edit(folder, change)
        with pytest.raises(HollowError, match=r"store\.json was changed since it was made\. Delete its folder"):
            Store.open(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": 1, "finger', r"store\.json is not valid JSON .*Delete it and make it again"),
        ("[]", r"store\.json is no index of a record store"),
        ('{"format": 1, "fingerprint": {"cut": 3}, "records": []}', r"store\.json is no index of a record store"),
        ('{"format": 2}', r"store\.json has the unknown format 2\. Precompute into a new folder"),
    ],
)
def test_a_damaged_index_is_told_and_touches_nothing(make_store, text, said):
    store = make_store()
    (store.folder / "store.json").write_text(text)
    before = content(store.folder)
    with pytest.raises(HollowError, match=said):
        make_store()
    assert content(store.folder) == before


def test_without_its_index_a_store_begins_anew(make_store):
    store = make_store()
    whole = content(store.folder)
    (store.folder / "store.json").unlink()
    with pytest.raises(HollowError, match=r"store\.json cannot be read"):
        Store.open(store.folder)
    (store.folder / "records-00009.safetensors").write_bytes(b"of a longer store")
    make_store()
    assert content(store.folder) == whole


def test_the_index_is_readable(make_store):
    index = json.loads((make_store().folder / "store.json").read_text())
    assert set(index["records"][0]) == {"image", "kind", "timestep", "noise_seed"}
    assert index["fingerprint"]["prompts"][0] == {"personal": "a photo of a sks dog", "generic": "a photo of a dog"}


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def test_a_record_is_read_without_its_neighbours(make_store):
    store = make_store()
    size = 16 * 2**20
    store.write_shard(0, {i: {EXIT_ACTIVATION: torch.full((1, 4, size // 16), float(i))} for i in range(8)})
    before = resident_bytes()
    exit_activation = store.record(5).stored[EXIT_ACTIVATION]
    assert exit_activation.eq(5).all()
    assert resident_bytes() - before < 2 * size


def test_the_store_of_a_unet_is_written_as_it_always_was(make_store):
    """As version 0.1 did: with the number of a record alone. Such stores are on users' disks."""
    store = make_store()
    with safe_open(store.folder / "records-00001.safetensors", "pt") as shard:
        assert {*shard.keys()} == {str(index) for index in range(8, 16)}
        assert torch.equal(shard.get_tensor("11"), store.record(11).stored[EXIT_ACTIVATION])
    index = json.loads((store.folder / "store.json").read_text())
    assert index["format"] == 1
    assert index["fingerprint"].keys() == {
        "model", "cut", "schedule", "samples", "seed", "dtype", "kinds", "prompts", "embeddings", "latents"
    }  # fmt: skip


def test_a_record_may_hold_several_tensors_by_name(make_store):
    store = make_store()
    kept = {i: {"state": torch.full((1, 3), float(i)), "the residual": torch.full((2,), -float(i))} for i in range(8)}
    store.write_shard(0, kept)
    opened = Store.open(store.folder)
    assert opened.record(3).stored.keys() == {"state", "the residual"}
    assert all(torch.equal(opened.record(i).stored[name], kept[i][name]) for i in kept for name in kept[i])
    del kept[3]["the residual"]
    store.write_shard(0, kept)
    with pytest.raises(HollowError, match=r"records-00000\.safetensors does not hold what its store\.json says"):
        Store.open(store.folder)


def test_digest_tells_dtype_shape_and_bytes_apart():
    ones = torch.ones(2, 3)
    assert digest(ones) == digest(torch.ones(3, 2).t()) == digest(torch.ones(4, 3)[::2])
    others = [ones.half(), ones.reshape(3, 2), ones * 1.0000001, torch.ones(())]
    assert len({digest(tensor) for tensor in [ones, *others]}) == 5
