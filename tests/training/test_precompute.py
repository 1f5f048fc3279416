"""Stage 1: which records are made, that they are what the whole U-Net computes, and that a run goes on."""

import os
import signal
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_training import BreakAt, Broken, content, full_disk, run_script, tiny_examples, tiny_schedule

from hollow_core.errors import HollowError
from hollow_core.lora.layers import add_lora, remove_lora
from hollow_core.nets.schedule import PREDICTIONS, NoiseSchedule
from hollow_core.nets.unet import EXIT_ACTIVATION, UNet
from hollow_core.nets.unet_layers import max_cut
from hollow_core.training.precompute import plan, precompute
from hollow_core.training.store import SHARD, Store


def schedule_of(timesteps):
    return NoiseSchedule(PREDICTIONS["epsilon"], torch.linspace(0.99, 0.01, timesteps))


@settings(deadline=None)
@given(
    images=st.integers(1, 7),
    priors=st.integers(0, 5),
    samples=st.integers(2, 300),
    timesteps=st.integers(10, 1000),
    seed=st.integers(0, 2**32),
)
def test_plan_is_stratified_over_time_and_dealt_evenly_over_examples(images, priors, samples, timesteps, seed):
    records = plan(["image"] * images + ["prior"] * priors, samples, schedule_of(timesteps), seed)
    assert len(records) == samples
    by_kind = {kind: [record for record in records if record.kind == kind] for kind in ("image", "prior")}
    assert len(by_kind["prior"]) == (samples // 2 if priors else 0)
    for kind, members in (("image", range(images)), ("prior", range(images, images + priors))):
        drawn = by_kind[kind]
        counts = [sum(record.image == member for record in drawn) for member in members]
        assert not counts or max(counts) - min(counts) <= 1
        for stratum, record in enumerate(drawn):  # one in each stretch, whose ends may share a time step
            assert int(stratum * timesteps / len(drawn)) <= record.timestep
            assert record.timestep <= min((stratum + 1) * timesteps / len(drawn), timesteps - 1)
        for start in range(0, len(drawn) - len(members) + 1, len(members) or 1):  # neighbours in time
            assert sorted(r.image for r in drawn[start : start + len(members)]) == list(members)


def test_default_plan_deals_forty_records_to_each_of_five_images_with_noises_of_their_own():
    records = plan(["image"] * 5, 200, schedule_of(1000), seed=0)
    assert [record.timestep // 5 for record in records] == list(range(200))
    assert Counter(record.image for record in records) == dict.fromkeys(range(5), 40)
    assert len({record.noise_seed for record in records}) == 200
    again, other = (plan(["image"] * 5, 200, schedule_of(1000), seed=seed) for seed in (0, 1))
    assert records == again != other


def test_stored_activation_is_what_the_up_path_of_the_whole_unet_receives(
    tiny_unet, tiny_conditioning, layout, tmp_path
):
    unet, schedule = tiny_unet(layout), tiny_schedule()
    examples = tiny_examples(unet, images=1, priors=1)
    up_resnets = [resnet for block in unet.up_blocks for resnet in block.resnets]
    for cut in range(max_cut(unet.config) + 1):
        folder = tmp_path / str(cut)
        store = precompute(UNet(unet), schedule, examples, folder, cut=cut, samples=2, seed=cut, dtype=torch.float32)
        received = []
        hook = up_resnets[cut].register_forward_pre_hook(lambda _, args, to=received: to.append(args[0]))
        for record in (store.record(0), store.record(1)):
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(record.noise_seed))
            z, alpha = examples[record.image].latents, schedule.numbers[record.timestep]
            with torch.no_grad():
                noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
                unet(noisy, record.timestep, **tiny_conditioning(unet, seed=2).kwargs())
            channels = record.stored[EXIT_ACTIVATION].shape[1]  # behind them comes the skip connection
            torch.testing.assert_close(
                record.stored[EXIT_ACTIVATION], received.pop()[:, :channels], atol=1e-5, rtol=1e-5
            )
        hook.remove()


def test_noise_is_regenerated_and_never_stored(tiny_unet, tmp_path):
    unet, schedule = tiny_unet("sd21"), tiny_schedule()
    store = precompute(UNet(unet), schedule, tiny_examples(unet), tmp_path, cut=3, samples=10)
    latents, _ = store.inputs(0)
    stored = [tensor for path in tmp_path.glob("*.safetensors") for tensor in load_file(path).values()]
    again = Store.open(tmp_path)
    for record, same in zip(store.records, again.records, strict=True):
        noisy, noise = record.noisy(schedule, latents)
        for regenerated, once_more in zip((noisy, noise), same.noisy(schedule, latents), strict=True):
            assert torch.equal(regenerated, once_more)
            assert not any(torch.equal(regenerated, tensor.float()) for tensor in stored)
    assert len(stored) == 10 + 2 + 1  # activations, latents, and the one prompt of training
    assert sum(tensor.numel() for tensor in stored) == 10 * 24 * 2 * 2 + 2 * 4 * 8 * 8 + 5 * 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_records_are_kept_in_the_dtype_of_choice(tiny_unet, tmp_path, dtype):
    unet, schedule = tiny_unet("sd15"), tiny_schedule()
    exact = precompute(
        UNet(unet), schedule, tiny_examples(unet), tmp_path / "exact", cut=3, samples=2, dtype=torch.float32
    )
    store = precompute(UNet(unet), schedule, tiny_examples(unet), tmp_path / "half", cut=3, samples=2, dtype=dtype)
    assert torch.equal(store.record(1).stored[EXIT_ACTIVATION], exact.record(1).stored[EXIT_ACTIVATION].to(dtype))


def test_pictures_of_different_and_odd_sizes(tiny_unet, tmp_path):
    unet = tiny_unet("sd21")
    small, large = tiny_examples(unet, images=2)
    large = replace(large, latents=torch.randn(1, 4, 13, 10, generator=torch.Generator()))
    store = precompute(UNet(unet), tiny_schedule(), [small, large], tmp_path, cut=3, samples=4)
    shapes = {record.image: store.record(i).stored[EXIT_ACTIVATION].shape[2:] for i, record in enumerate(store.records)}
    assert shapes == {0: (2, 2), 1: (4, 3)}


def test_records_of_one_size_go_together_and_are_what_each_would_be_alone(tiny_unet, tmp_path):
    unet, schedule = tiny_unet("sd21"), tiny_schedule()
    small, large = tiny_examples(unet, images=2)
    large = replace(large, latents=torch.randn(1, 4, 13, 10, generator=torch.Generator()))
    batches = []
    unet.conv_in.register_forward_pre_hook(lambda _, args: batches.append(tuple(args[0].shape)))
    told, asked = [], {"cut": 3, "samples": 12, "dtype": torch.float32}
    alone = precompute(UNet(unet), schedule, [small, large], tmp_path / "alone", **asked)
    batches.clear()
    store = precompute(
        UNet(unet), schedule, [small, large], tmp_path / "three", together=3, progress=told.append, **asked
    )
    assert [progress.step for progress in told] == list(range(1, 13))
    of_one_size = [(3, 4, 8, 8), (1, 4, 8, 8), (3, 4, 13, 10), (1, 4, 13, 10), (2, 4, 8, 8), (2, 4, 13, 10)]
    assert sorted(batches) == sorted(of_one_size)  # shards of eight and four
    for index in range(12):
        mine, expected = (each.record(index).stored[EXIT_ACTIVATION] for each in (store, alone))
        torch.testing.assert_close(mine, expected)


def test_records_that_a_store_beside_has_are_taken_and_are_what_they_would_be(tiny_unet, tmp_path):
    """One picture of three is another: what is left of the others serves, bit by bit, but not at another cut, and
    nothing of a store in which a bit has flipped."""
    unet, schedule = tiny_unet("sd21"), tiny_schedule()
    passes = []
    unet.conv_in.register_forward_pre_hook(lambda *_: passes.append(1))
    examples = tiny_examples(unet, images=3)
    changed = [*examples[:2], replace(examples[2], latents=examples[2].latents + 1)]
    asked = {"samples": 12, "seed": 1}
    run = partial(precompute, UNet(unet), schedule, **asked)

    def passed(folder, cut=3, beside=True, **how):
        passes.clear()
        store = run(changed, folder, cut=cut, beside=beside, **how)
        return store, len(passes)

    alone, made = passed(tmp_path / "alone" / "store")
    assert made == 12
    first = run(examples, tmp_path / "out" / "store", cut=3, beside=True)
    told = []
    store, made = passed(tmp_path / "out" / "store", progress=told.append)
    assert made == 4  # of the third
    assert [done.step for done in told] == [9, 10, 11, 12]
    assert store.folder != first.folder
    assert content(store.folder) == content(alone.folder)
    assert passed(tmp_path / "out" / "store")[1] == 0
    assert passed(tmp_path / "out" / "store", cut=2)[1] == 12
    assert passed(tmp_path / "another" / "store")[1] == 12

    first = run(examples, tmp_path / "damaged" / "store", cut=3)
    shard = first.folder / "records-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    store, made = passed(tmp_path / "damaged" / "store")
    assert made == 12
    assert content(store.folder) == content(alone.folder)


def test_without_a_cut_there_are_records_but_no_activations(tiny_unet, tmp_path):
    unet = tiny_unet("sd15")
    store = precompute(UNet(unet), tiny_schedule(), tiny_examples(unet), tmp_path, cut=None, samples=20)
    assert store.missing == []
    assert not store.record(7).stored
    assert sorted(content(tmp_path)) == ["inputs.safetensors", "store.json"]


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, 3])
def test_broken_off_in_every_shard_and_run_again_gives_the_same_bytes(tiny_unet, tmp_path, together):
    unet, schedule = tiny_unet("sd15"), tiny_schedule()
    examples = tiny_examples(unet, images=3, priors=2)
    samples = 2 * SHARD + 3
    asked = {"cut": 2, "samples": samples, "together": together}
    whole = precompute(UNet(unet), schedule, examples, tmp_path / "whole", **asked)
    for record in (1, SHARD - 1, SHARD, SHARD + 1, 2 * SHARD, samples):
        folder = tmp_path / f"broken at {record}"
        with pytest.raises(Broken):
            precompute(UNet(unet), schedule, examples, folder, **asked, progress=BreakAt(record))
        told = []
        precompute(UNet(unet), schedule, examples, folder, **asked, progress=told.append)
        assert content(folder) == content(whole.folder)
        kept = (record - 1) // SHARD * SHARD  # of the shards that were whole
        assert [progress.step for progress in told] == list(range(kept + 1, samples + 1))
        assert {progress.steps for progress in told} == {samples}
        assert told[-1].seconds_left == 0 < told[0].seconds_left


KILLED = """
import os, signal, sys
from tiny_unets import make_tiny_unet
from tiny_training import tiny_examples, tiny_schedule
from hollow_core.nets.unet import UNet
from hollow_core.training.precompute import precompute

def die(progress):
    if progress.step == 2 * 8 + 1:  # so that the first shard was waited for
        os.kill(os.getpid(), signal.SIGKILL)

unet = make_tiny_unet("sd15")
precompute(UNet(unet), tiny_schedule(), tiny_examples(unet), sys.argv[1], cut=2, samples=20, progress=die)
"""


@pytest.mark.slow
def test_killed_by_the_system_and_run_again_gives_the_same_bytes(tiny_unet, tmp_path):
    assert run_script(KILLED, tmp_path / "killed") == -signal.SIGKILL
    assert "records-00000.safetensors" in content(tmp_path / "killed")
    unet = tiny_unet("sd15")
    for folder in ("killed", "whole"):
        precompute(UNet(unet), tiny_schedule(), tiny_examples(unet), tmp_path / folder, cut=2, samples=20)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("file", [0, 1, 2, 5, 7])  # of inputs and plan, then of plan and shard three times
def test_dead_before_a_file_has_its_name_and_run_again_gives_the_same_bytes(tiny_unet, tmp_path, monkeypatch, file):
    unet = tiny_unet("sd15")
    whole = precompute(UNet(unet), tiny_schedule(), tiny_examples(unet), tmp_path / "whole", cut=2, samples=20)
    break_off, rename = BreakAt(file + 1), os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *names: break_off(names) or rename(*names))
        with pytest.raises(Broken):
            precompute(UNet(unet), tiny_schedule(), tiny_examples(unet), tmp_path / "dead", cut=2, samples=20)
    precompute(UNet(unet), tiny_schedule(), tiny_examples(unet), tmp_path / "dead", cut=2, samples=20)
    assert content(tmp_path / "dead") == content(whole.folder)


def test_stopped_it_gives_back_an_unfinished_store_and_goes_on_later(tiny_unet, tmp_path):
    unet, schedule = tiny_unet("sd15"), tiny_schedule()
    told = []
    store = precompute(
        UNet(unet),
        schedule,
        tiny_examples(unet),
        tmp_path,
        cut=2,
        samples=20,
        progress=told.append,
        stop=lambda: len(told) == 10,
    )
    assert store.missing == [1, 2]
    assert precompute(UNet(unet), schedule, tiny_examples(unet), tmp_path, cut=2, samples=20).missing == []


def test_a_full_disk_is_told_and_what_was_written_stays_good(tiny_unet, tmp_path):
    unet, schedule, examples = tiny_unet("sd15"), tiny_schedule(), tiny_examples(tiny_unet("sd15"))
    whole = precompute(UNet(unet), schedule, examples, tmp_path / "whole", cut=2, samples=20)
    folder = tmp_path / "full"
    with full_disk(), pytest.raises(HollowError, match=r"inputs\.safetensors could not be written \(.*space"):
        precompute(UNet(unet), schedule, examples, folder, cut=2, samples=20)
    assert content(folder) == {}

    store = precompute(UNet(unet), schedule, examples, folder, cut=2, samples=20, stop=lambda: True)
    assert store.missing == [0, 1, 2]
    before = content(folder)
    with full_disk(500), pytest.raises(HollowError, match=r"store\.json could not be written"):
        precompute(UNet(unet), schedule, examples, folder, cut=2, samples=20)
    assert content(folder) == before
    precompute(UNet(unet), schedule, examples, folder, cut=2, samples=20)
    assert content(folder) == content(whole.folder)


def scaled(example, factor):
    return replace(example, latents=example.latents * factor)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda asked: asked["network"].module.conv_in.bias.data.add_(1),
            r"model \(other weights, or .* another precision\)",
        ),
        (lambda asked: asked.update(cut=3), r"cut \(2 stored, 3 asked\)"),
        (lambda asked: asked.update(cut=None), r"cut \(2 stored, None asked\)"),
        (lambda asked: asked.update(samples=21), r"samples \(20 stored, 21 asked\)"),
        (lambda asked: asked.update(seed=1), r"seed \(0 stored, 1 asked\)"),
        (lambda asked: asked.update(dtype=torch.bfloat16), r"dtype \(float16 stored, bfloat16 asked\)"),
        (lambda asked: asked.update(schedule=tiny_schedule("v_prediction")), "schedule"),
        (
            lambda asked: asked.update(schedule=tiny_schedule(steps_offset=1, num_train_timesteps=999)),
            "schedule",
        ),
        (lambda asked: asked.update(examples=[scaled(e, 1.01) for e in asked["examples"]]), "the pictures themselves"),
        (
            lambda asked: asked.update(examples=[replace(e, personal_prompt="a dog") for e in asked["examples"]]),
            "captions and prompts",
        ),
        (
            lambda asked: asked.update(examples=[replace(e, generic=e.personal) for e in asked["examples"]]),
            "embedded prompts",
        ),
        (lambda asked: asked.update(cut=1, seed=7), r"cut \(2 stored, 1 asked\), seed \(0 stored, 7 asked\)"),
    ],
)
def test_a_store_made_from_something_else_is_refused_by_name(tiny_unet, tmp_path, change, said):
    unet = tiny_unet("sd15")
    asked = {"network": UNet(unet), "schedule": tiny_schedule(), "examples": tiny_examples(unet), "folder": tmp_path}
    asked |= {"cut": 2, "samples": 20}
    precompute(**asked)
    before = content(tmp_path)
    change(asked)
    with pytest.raises(HollowError, match=rf"made from something else: {said}\. Ask for what"):
        precompute(**asked)
    assert content(tmp_path) == before


def test_what_training_does_not_need_may_change(tiny_unet, tmp_path):
    unet = tiny_unet("sd15")
    store = precompute(UNet(unet), tiny_schedule(), tiny_examples(unet), tmp_path, cut=2, samples=4)
    sampler = tiny_schedule(clip_sample=False, timestep_spacing="trailing", steps_offset=1)
    assert precompute(UNet(unet), sampler, tiny_examples(unet), tmp_path, cut=2, samples=4).id == store.id


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cut": 12}, "has no cut 12. Choose a cut from 0 to 11"),
        ({"samples": 0}, "0 records are too few. Ask for at least 1"),
        ({"together": 0}, r"together is 0\. It must be at least 1"),
        ({"dtype": torch.int8}, "cannot be kept in int8. Choose one of float16, bfloat16, float32"),
        ({"examples": []}, "no image to train on"),
        (
            {"schedule": tiny_schedule("epsilon", rescale_betas_zero_snr=True)},
            "zero terminal SNR cannot train on epsilon",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(tiny_unet, tmp_path, change, said):
    unet = tiny_unet("sd15")
    asked = {"schedule": tiny_schedule(), "examples": tiny_examples(unet), "cut": 3} | change
    with pytest.raises(HollowError, match=said):
        precompute(UNet(unet), folder=tmp_path / "store", **asked)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"latents": torch.zeros(2, 4, 8, 8)},
            r"example 0 have shape \(2, 4, 8, 8\), but .* \(1, 4, height, width\)",
        ),
        ({"latents": torch.zeros(1, 9, 8, 8)}, r"shape \(1, 9, 8, 8\), but this U-Net takes"),
        ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, "latents of example 0 are not finite"),
    ],
)
def test_wrong_latents_are_refused(tiny_unet, tmp_path, change, said):
    unet = tiny_unet("sd15")
    examples = [replace(tiny_examples(unet)[0], **change)]
    with pytest.raises(HollowError, match=said):
        precompute(UNet(unet), tiny_schedule(), examples, tmp_path, cut=3)


def test_prompts_of_another_models_text_encoder_are_refused(tiny_unet, tmp_path):
    unet, other = tiny_unet("sd15"), tiny_unet("sd21")
    with pytest.raises(HollowError, match="example 0 are 16 wide, but this U-Net takes 12"):
        precompute(UNet(unet), tiny_schedule(), tiny_examples(other), tmp_path, cut=3)


def test_a_unet_with_a_lora_is_refused_until_it_is_taken_out(tiny_unet, tmp_path):
    unet, schedule = tiny_unet("sd15"), tiny_schedule()
    plain = precompute(UNet(unet), schedule, tiny_examples(unet), tmp_path, cut=3, samples=2)
    add_lora(unet, 2, generator=torch.Generator())
    with pytest.raises(HollowError, match=r"carries a LoRA, .* Take it out first"):
        precompute(UNet(unet), schedule, tiny_examples(unet), tmp_path, cut=3, samples=2)
    remove_lora(unet)
    assert precompute(UNet(unet), schedule, tiny_examples(unet), tmp_path, cut=3, samples=2).id == plain.id


def test_an_activation_too_large_for_fp16_is_refused_and_fits_bf16(tiny_unet, tmp_path):
    unet = tiny_unet("sd15")
    unet.mid_block.resnets[-1].conv2.bias.data += 1e6
    with pytest.raises(HollowError, match=r"is not finite in float16\. Keep the records in bfloat16"):
        precompute(UNet(unet), tiny_schedule(), tiny_examples(unet), tmp_path / "fp16", cut=0, samples=2)
    precompute(
        UNet(unet), tiny_schedule(), tiny_examples(unet), tmp_path / "bf16", cut=0, samples=2, dtype=torch.bfloat16
    )
