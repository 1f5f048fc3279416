"""Stage 2: what a step minimises, that runs go on to the same LoRA bit by bit, and that trouble is told."""

import gc
import json
import math
import re
import signal
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_training import (
    BreakAt,
    Broken,
    OutOfMemoryAt,
    content,
    full_disk,
    run_script,
    same,
    tiny_examples,
    tiny_schedule,
)
from tiny_unets import make_shallow_unet, make_tiny_conditioning

from hollow_core.errors import HollowError
from hollow_core.lora.layers import ATTENTION, layers_of_any_lora, lora_off, lora_parameters, lora_state
from hollow_core.nets.unet import EXIT_ACTIVATION, UNet
from hollow_core.training.precompute import precompute
from hollow_core.training.settings import DTYPES, TrainSettings
from hollow_core.training.train import train

CUT = 1
FEW = TrainSettings(rank=2, steps=6, learning_rate=1e-3)


@pytest.fixture
def begin(tmp_path):
    """Precompute into a store of its own and hollow, for `train`: unet, schedule, store."""

    def begin(layout="sd15", schedule=None, cut=CUT, samples=4, priors=0, images=2):
        schedule = tiny_schedule() if schedule is None else schedule
        unet = make_shallow_unet(layout)
        folder = tmp_path / f"store {layout} {cut} {samples} {priors}"
        store = precompute(UNet(unet), schedule, tiny_examples(unet, images, priors), folder, cut=cut, samples=samples)
        return (UNet(unet) if cut is None else UNet(unet).hollow(cut, range(1000))), schedule, store

    return begin


def finite(state):
    return all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.slow
@pytest.mark.parametrize("cut", [None, CUT])
def test_loss_falls(begin, tmp_path, cut):
    targets = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")
    settings = TrainSettings(rank=4, steps=48, learning_rate=3e-2, targets=targets)
    result = train(*begin(cut=cut), settings, folder=tmp_path)
    assert result.stopped == "finished"
    assert result.steps == len(result.losses) == 48
    first, last = sum(result.losses[:4]), sum(result.losses[-4:])  # of one epoch
    assert last < 0.7 * first


def test_first_loss_is_equation_1_plus_the_weighted_prior_of_equation_2(begin, tmp_path):
    """With B zero and the prior's prompt on both paths, the prior's loss is that of the whole base U-Net."""
    network, schedule, store = begin(samples=2, images=1, priors=1)
    losses = {
        weight: train(
            network, schedule, store, replace(FEW, steps=1, prior_weight=weight), folder=tmp_path / str(weight)
        ).losses[0]
        for weight in (0.0, 0.5, 1.0)
    }
    unet, record = make_shallow_unet("sd15"), store.records[1]
    prior = tiny_examples(unet, images=1, priors=1)[1]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(record.noise_seed))
    alpha = schedule.numbers[record.timestep]
    noisy = alpha.sqrt() * prior.latents + (1 - alpha).sqrt() * noise
    with torch.no_grad():
        predicted = unet(noisy, record.timestep, **prior.generic.kwargs()).sample
    equation_2 = (noise - predicted).square().mean().item()
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * equation_2, rel=1e-3)  # the record is in fp16
    assert losses[1.0] - losses[0.0] == pytest.approx(equation_2, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "cut", "strategy"), [("sd15", None, "bp"), ("sdxl", 1, "bp"), ("sd15", CUT, "zo")])
def test_records_that_pass_together_give_the_losses_of_one_by_one(begin, tmp_path, layout, cut, strategy):
    """In fewer passes of the U-Net."""
    settings = replace(FEW, batch=2, snr_gamma=5.0, strategy=strategy, zo_queries=1)
    losses, passes = {}, []
    for together in (1, 3, 64):
        network, schedule, store = begin(layout, cut=cut, samples=8, images=2, priors=2)
        network.module.conv_in.register_forward_hook(lambda *_: passes.append(1))
        losses[together] = train(
            network, schedule, store, replace(settings, together=together), folder=tmp_path / str(together)
        ).losses
        of_loss = 2 if strategy == "zo" else 1
        assert len(passes) == of_loss * settings.steps * {1: 4, 3: 2, 64: 1}[together]
        passes.clear()
    assert losses[3] == pytest.approx(losses[1], rel=1e-3)
    assert losses[64] == pytest.approx(losses[1], rel=1e-3)


def test_records_of_different_sizes_pass_one_after_the_other(tiny_unet, tmp_path):
    unet, schedule = tiny_unet("sd15"), tiny_schedule()
    small, large = tiny_examples(unet, 1)[0], tiny_examples(unet, 1, size=16)[0]
    longer = replace(large, personal=make_tiny_conditioning(unet, tokens=10))
    store = precompute(UNet(unet), schedule, [small, large, longer], tmp_path / "store", cut=None, samples=3)
    settings = replace(FEW, steps=2, batch=3)
    one_by_one = train(UNet(unet), schedule, store, settings, folder=tmp_path / "one").losses
    together = train(UNet(unet), schedule, store, replace(settings, together=3), folder=tmp_path / "three").losses
    assert together == one_by_one


@pytest.mark.parametrize("layout", ["sd21", "sdxl"])
def test_every_layout_trains_on_its_attention(begin, tmp_path, layout):
    network, schedule, store = begin(layout, cut=1)
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    result = train(network, schedule, store, FEW, folder=tmp_path)
    assert finite(result.state)
    assert {key.rsplit(".lora_", 1)[0].split(".attn", 1)[1][2:] for key in result.state} == set(ATTENTION)
    assert all(tensor.any() for key, tensor in result.state.items() if "lora_B" in key)
    assert same(lora_state(network.module), result.state)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in network.module.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_zero_terminal_snr_with_v_prediction_trains_at_every_time_step(begin, tmp_path):
    changes = {"num_train_timesteps": 8, "rescale_betas_zero_snr": True}
    network, schedule, store = begin(schedule=tiny_schedule("v_prediction", **changes), samples=8)
    assert [record.timestep for record in store.records] == list(range(8))
    for gamma in (None, 5.0):
        settings = replace(FEW, steps=8, snr_gamma=gamma)
        result = train(network, schedule, store, settings, folder=tmp_path / str(gamma))
        assert result.stopped == "finished"
        assert all(map(math.isfinite, result.losses))
        assert finite(result.state)


@pytest.mark.slow
def test_same_seed_same_lora_and_another_seed_another(begin, tmp_path):
    first, again, other = (
        train(*begin(), replace(FEW, seed=seed), folder=tmp_path / name)
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert same(first.state, again.state)
    assert first.losses == again.losses
    assert not same(first.state, other.state)
    assert content(tmp_path / "first") == content(tmp_path / "again")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        FEW,
        replace(FEW, steps=4, batch=2, precision="fp16"),
        replace(FEW, steps=2, dora=True, gradient_checkpointing=True),
        replace(FEW, steps=2, dora=True, strategy="zo", precision="bf16"),
    ],
)
def test_stopped_at_any_step_and_gone_on_gives_the_same_lora(begin, tmp_path, settings):
    network, schedule, store = begin(priors=1)
    network.module.to(DTYPES[settings.precision])
    whole = train(network, schedule, store, settings, folder=tmp_path / "whole")
    for step in range(settings.steps):
        folder, stop = tmp_path / f"stopped at {step}", iter([False] * step + [True])
        stopped = train(network, schedule, store, settings, folder=folder, stop=stop.__next__)
        assert (stopped.stopped, stopped.steps) == ("stop", step)
        result = train(network, schedule, store, settings, folder=folder)
        assert same(result.state, whole.state)
        assert result.losses == whole.losses
        assert content(folder) == content(tmp_path / "whole")


@pytest.mark.slow
def test_broken_off_at_any_step_and_gone_on_gives_the_same_lora(begin, tmp_path):
    network, schedule, store = begin()
    settings = replace(FEW, save_every=2)
    whole = train(network, schedule, store, FEW, folder=tmp_path / "whole")
    for step in range(1, settings.steps + 1):
        folder, told = tmp_path / f"broken at {step}", []
        with pytest.raises(Broken):
            train(network, schedule, store, settings, folder=folder, progress=BreakAt(step))
        result = train(network, schedule, store, settings, folder=folder, progress=told.append)
        assert same(result.state, whole.state)
        assert told[0].step == min(step // 2 * 2, 4) + 1
        assert content(folder) == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [FEW, replace(FEW, strategy="zo")])
def test_out_of_memory_at_a_step_and_gone_on_gives_the_same_lora(begin, tmp_path, settings):
    whole = train(*begin(), settings, folder=tmp_path / "whole")
    for call in (1, 6):
        network, schedule, store = begin()
        hook, told = network.module.up_blocks[-1].register_forward_hook(OutOfMemoryAt(call)), []
        with pytest.raises(torch.cuda.OutOfMemoryError):
            train(network, schedule, store, settings, folder=tmp_path / str(call), progress=told.append)
        hook.remove()
        goes_on = []
        result = train(network, schedule, store, settings, folder=tmp_path / str(call), progress=goes_on.append)
        assert [done.step for done in told + goes_on] == [1, 2, 3, 4, 5, 6]  # no step is lost
        assert same(result.state, whole.state)
        assert content(tmp_path / str(call)) == content(tmp_path / "whole")


@pytest.mark.slow
def test_out_of_memory_amid_fused_updates_goes_on_from_the_last_checkpoint(begin, tmp_path):
    settings = replace(FEW, fused_backward=True, max_grad_norm=math.inf, save_every=2)
    whole = train(*begin(), settings, folder=tmp_path / "whole")
    network, schedule, store = begin()
    last = network.module.up_blocks[-1].resnets[-1]
    hook = last.register_full_backward_hook(OutOfMemoryAt(4))  # what is behind it is updated
    with pytest.raises(torch.cuda.OutOfMemoryError):
        train(network, schedule, store, settings, folder=tmp_path / "run")
    hook.remove()
    told = []
    result = train(network, schedule, store, settings, folder=tmp_path / "run", progress=told.append)
    assert told[0].step == 3
    assert same(result.state, whole.state)


KILLED = """
import os, signal, sys
from tiny_unets import make_shallow_unet
from tiny_training import tiny_schedule
from hollow_core.nets.unet import UNet
from hollow_core.training.settings import TrainSettings
from hollow_core.training.store import Store
from hollow_core.training.train import train

def die(progress):
    if progress.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

network = UNet(make_shallow_unet("sd15")).hollow(1, range(1000))
settings = TrainSettings(rank=2, steps=6, learning_rate=1e-3, save_every=2)
train(network, tiny_schedule(), Store.open(sys.argv[1]), settings, folder=sys.argv[2], progress=die)
"""


@pytest.mark.slow
def test_killed_by_the_system_and_gone_on_gives_the_same_lora(begin, tmp_path):
    _, _, store = begin()
    assert run_script(KILLED, store.folder, tmp_path / "killed") == -signal.SIGKILL
    told = []
    result = train(*begin(), FEW, folder=tmp_path / "killed", progress=told.append)
    assert [progress.step for progress in told] == [5, 6]
    whole = train(*begin(), FEW, folder=tmp_path / "whole")
    assert same(result.state, whole.state)
    assert result.losses == whole.losses


@pytest.mark.slow
def test_more_steps_go_on_where_fewer_ended(begin, tmp_path):
    train(*begin(), replace(FEW, steps=4), folder=tmp_path / "longer")
    settings = replace(FEW, save_every=1, gradient_checkpointing=True, together=2)  # these, too, are free to change
    longer = train(*begin(), settings, folder=tmp_path / "longer")
    whole = train(*begin(), FEW, folder=tmp_path / "whole")
    for key, tensor in whole.state.items():
        torch.testing.assert_close(longer.state[key], tensor)
    assert longer.losses[:4] == whole.losses[:4]
    with pytest.raises(HollowError, match=r"has 6 steps already, more than the 5 asked\. Ask for more"):
        train(*begin(), replace(FEW, steps=5), folder=tmp_path / "longer")
    finished = train(*begin(), FEW, folder=tmp_path / "longer")
    assert same(finished.state, longer.state)
    assert finished.stopped == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 4}, r"rank \(2 there, 4 asked\)"),
        ({"learning_rate": 1e-4, "seed": 3}, r"learning_rate \(0.001 there, 0.0001 asked\), seed \(0 there, 3 asked\)"),
        ({"targets": ("to_q",)}, "targets"),
        ({"precision": "bf16"}, r"precision \(fp32 there, bf16 asked\)"),
        ({"lr_schedule": "cosine"}, r"differs: lr_schedule \(constant there, cosine asked\)\. Go back"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_name_but_the_store_serves(begin, tmp_path, change, said):
    network, schedule, store = begin()
    before = content(store.folder)
    train(network, schedule, store, FEW, folder=tmp_path / "run")
    checkpoint = content(tmp_path / "run")
    network.module.to(DTYPES[change.get("precision", "fp32")])
    with pytest.raises(HollowError, match=rf"checkpoint\.safetensors is of a training that .*{said}"):
        train(network, schedule, store, replace(FEW, **change), folder=tmp_path / "run")
    assert content(tmp_path / "run") == checkpoint
    train(network, schedule, store, replace(FEW, **change), folder=tmp_path / "another run")
    assert content(store.folder) == before


def test_a_checkpoint_of_another_store_is_refused(begin, tmp_path):
    train(*begin(), FEW, folder=tmp_path)
    with pytest.raises(HollowError, match="of a training that differs: store"):
        train(*begin(samples=5), FEW, folder=tmp_path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "is not a whole safetensors file"),
        (lambda path: path.write_bytes(b"\x08\0\0\0\0\0\0\0{}      "), "is no checkpoint of a training"),
    ],
)
def test_a_damaged_checkpoint_is_told(begin, tmp_path, spoil, said):
    train(*begin(), FEW, folder=tmp_path / "run")
    spoil(tmp_path / "run" / "checkpoint.safetensors")
    with pytest.raises(HollowError, match=rf"checkpoint\.safetensors {said}"):
        train(*begin(), FEW, folder=tmp_path / "run")


def test_a_full_disk_is_told_and_the_last_checkpoint_stays(begin, tmp_path):
    network, schedule, store = begin()
    train(network, schedule, store, replace(FEW, steps=4), folder=tmp_path / "run")
    before = content(tmp_path / "run")
    with full_disk(2000), pytest.raises(HollowError, match=r"checkpoint\.safetensors could not be written \(.*space"):
        train(network, schedule, store, FEW, folder=tmp_path / "run")
    assert content(tmp_path / "run") == before
    train(network, schedule, store, FEW, folder=tmp_path / "run")


def test_the_base_is_gone_from_memory_while_training(tiny_unet, tmp_path):
    unet, schedule = tiny_unet("sd21"), tiny_schedule()
    store = precompute(UNet(unet), schedule, tiny_examples(unet), tmp_path / "store", cut=3, samples=4)
    network = UNet(unet).hollow(3, range(1000))
    remaining = {id(parameter) for parameter in network.module.parameters()}
    gone = [weakref.ref(parameter) for parameter in unet.parameters() if id(parameter) not in remaining]
    gone += [weakref.ref(unet), weakref.ref(unet.mid_block), weakref.ref(unet.time_embedding)]
    total = sum(parameter.numel() for parameter in unet.parameters())
    assert sum(ref().numel() for ref in gone[:-3]) > 0.3 * total
    del unet
    gc.collect()
    alive = []
    train(network, schedule, store, FEW, folder=tmp_path, progress=lambda _: alive.append([r for r in gone if r()]))
    assert alive == [[]] * FEW.steps


def poison(store, index):
    """Make one stored activation not finite."""
    stored = {i: store.record(i).stored[EXIT_ACTIVATION].clone() for i in store.shard(index // 8)}
    stored[index][:] = torch.nan
    store.write_shard(index // 8, {i: {EXIT_ACTIVATION: tensor} for i, tensor in stored.items()})


def test_a_non_finite_loss_stops_with_the_lora_of_the_last_finite_one(begin, tmp_path):
    network, schedule, store = begin(samples=8)
    told = []
    settings = replace(FEW, steps=8, save_every=1)
    whole = train(network, schedule, store, settings, folder=tmp_path / "whole", progress=told.append)
    poison(store, 3)
    snapshots = []
    result = train(
        network,
        schedule,
        store,
        settings,
        folder=tmp_path / "run",
        progress=lambda _: snapshots.append(lora_state(network.module)),
    )
    assert result.stopped == "non-finite loss"
    assert 0 < result.steps == len(snapshots) < 8
    assert result.losses == whole.losses[: result.steps]
    assert finite(result.state)
    assert same(result.state, lora_state(network.module))
    before_last_update = (
        snapshots[-2]
        if result.steps > 1
        else train(network, schedule, store, settings, folder=tmp_path / "start", stop=lambda: True).state
    )
    assert same(result.state, before_last_update)
    saved = load_file(tmp_path / "run" / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_an_exploding_update_leaves_the_lora_from_before_it(begin, tmp_path):
    network, schedule, store = begin()
    start = train(network, schedule, store, FEW, folder=tmp_path / "start", stop=lambda: True).state
    result = train(network, schedule, store, replace(FEW, learning_rate=1e30), folder=tmp_path / "run")
    assert (result.stopped, result.steps) == ("non-finite loss", 1)
    assert same(result.state, start)
    assert content(tmp_path / "run") == {}


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "skipped"), [("fp32", 0), ("fp16", 16)])
def test_a_non_finite_gradient_is_never_applied(begin, tmp_path, precision, skipped):
    network, schedule, store = begin()
    network.module.conv_out.register_full_backward_hook(lambda module, to_input, _: (to_input[0] * math.inf,))
    network.module.to(DTYPES[precision])
    settings = replace(FEW, steps=40, precision=precision)
    start = train(network, schedule, store, settings, folder=tmp_path, stop=lambda: True).state
    result = train(network, schedule, store, settings, folder=tmp_path)
    assert (result.stopped, result.steps) == ("non-finite gradient", skipped)  # fp16 scales its loss down first
    assert same(result.state, start)


def test_the_gradient_is_clipped_to_its_norm(begin, tmp_path):
    network, schedule, store = begin(samples=1)

    def first_gradient(folder, **change):
        network.module.to(DTYPES[change.get("precision", "fp32")])
        train(network, schedule, store, replace(FEW, steps=1, **change), folder=folder)
        saved = load_file(folder / "checkpoint.safetensors")
        moments = [tensor for name, tensor in saved.items() if name.endswith("exp_avg")]  # (1 - β₁) times it
        return math.sqrt(sum(moment.square().sum().item() for moment in moments)) / (1 - 0.9)

    whole = first_gradient(tmp_path / "whole", max_grad_norm=math.inf)
    assert first_gradient(tmp_path / "half", max_grad_norm=whole / 2) == pytest.approx(whole / 2, rel=1e-3)
    scaled = first_gradient(tmp_path / "fp16", max_grad_norm=math.inf, precision="fp16")
    assert scaled == pytest.approx(whole, rel=0.05)  # the scale of the loss is out of it again


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_finite_and_near_to_single(begin, tmp_path, precision):
    exact = train(*begin(), FEW, folder=tmp_path / "fp32")
    network, schedule, store = begin()
    outputs = []
    network.module.conv_in.register_forward_hook(lambda _module, _args, output: outputs.append(output.dtype))
    network.module.to(DTYPES[precision])
    result = train(network, schedule, store, replace(FEW, precision=precision), folder=tmp_path / precision)
    assert set(outputs) == {DTYPES[precision]}
    assert result.stopped == "finished"
    assert result.losses == pytest.approx(exact.losses, rel=0.03)
    assert finite(result.state)
    assert {parameter.dtype for parameter in lora_parameters(network.module)} == {torch.float32}
    assert any(tensor.any() for key, tensor in result.state.items() if "lora_B" in key)


def test_a_base_in_another_precision_is_refused(begin, tmp_path):
    with pytest.raises(HollowError, match=r"in float32, but the precision is bf16\. Load it in that precision"):
        train(*begin(), replace(FEW, precision="bf16"), folder=tmp_path)


def test_a_base_in_half_precision_trains_too(tiny_unet, tmp_path):
    unet, schedule = tiny_unet("sd21").to(torch.bfloat16), tiny_schedule()
    store = precompute(UNet(unet), schedule, tiny_examples(unet), tmp_path, cut=CUT, samples=4, dtype=torch.bfloat16)
    network = UNet(unet).hollow(CUT, range(1000))
    result = train(network, schedule, store, replace(FEW, precision="bf16"), folder=tmp_path / "run")
    assert result.stopped == "finished"
    assert {tensor.dtype for tensor in result.state.values()} == {torch.float32}
    assert network.dtype == network.module.conv_in.weight.dtype == torch.bfloat16


def test_a_batch_is_the_mean_of_its_records_and_each_record_comes_once_an_epoch(begin, tmp_path):
    network, schedule, store = begin()
    still = replace(FEW, learning_rate=1e-30, steps=8)
    one = train(network, schedule, store, still, folder=tmp_path / "one").losses
    two = train(network, schedule, store, replace(still, batch=2, steps=4), folder=tmp_path / "two").losses
    assert two == pytest.approx([(a + b) / 2 for a, b in zip(one[::2], one[1::2], strict=True)])
    assert sorted(one[:4]) == pytest.approx(sorted(one[4:]))
    assert len(set(one[:4])) == 4


def test_it_tells_how_far_it_is_and_saves_on_the_way(begin, tmp_path):
    network, schedule, store = begin()
    told, saved = [], []

    def progress(done):
        told.append(done)
        with torch.no_grad(), lora_off(layers_of_any_lora(network.module)):  # looking does not change the outcome
            saved.append((tmp_path / "run" / "checkpoint.safetensors").exists())

    settings = replace(FEW, save_every=2)
    result = train(network, schedule, store, settings, folder=tmp_path / "run", progress=progress)
    assert [(progress.step, progress.steps) for progress in told] == [(step, 6) for step in range(1, 7)]
    assert [progress.loss for progress in told] == result.losses
    assert told[-1].seconds_left == 0 < told[0].seconds_left
    assert saved == [False, True, True, True, True, True]
    assert same(result.state, train(*begin(), FEW, folder=tmp_path / "unseen").state)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 0}, r"rank is 0\. It must be at least 1"),
        ({"alpha": 0.0}, r"alpha is 0\.0\. It must be above 0"),
        ({"targets": ()}, r"targets is \(\)\. Name at least one, such as to_q"),
        ({"steps": 0}, r"steps is 0\. It must be at least 1"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0\. It must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"weight_decay": -0.1}, r"weight_decay is -0\.1\. It must be 0 or more"),
        ({"batch": 0}, "batch is 0"),
        ({"prior_weight": -1.0}, "prior_weight is -1"),
        ({"snr_gamma": 0.0}, "snr_gamma is 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0"),
        ({"precision": "fp8"}, r"precision is 'fp8'\. Choose fp32, bf16 or fp16"),
        ({"dora": True, "lora_precision": "bf16"}, "dora does not go with lora_precision bf16, which rounds"),
        ({"seed": -1}, "seed is -1"),
        ({"save_every": -1}, "save_every is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, said):
    with pytest.raises(HollowError, match=said):
        TrainSettings(**change)


def test_defaults_are_the_papers():
    settings = TrainSettings()
    assert (settings.steps, settings.rate, settings.batch) == (1000, 1e-4, 1)
    assert settings.targets == ("to_q", "to_k", "to_v", "to_out.0")


def test_what_does_not_belong_together_is_refused(begin, tiny_unet, tmp_path):
    network, schedule, store = begin()
    with pytest.raises(HollowError, match=r"U-Net has cut None, the store in .* has cut 1"):
        train(UNet(tiny_unet("sd15")), schedule, store, FEW, folder=tmp_path / "run")
    with pytest.raises(HollowError, match="made with another noise schedule"):
        train(network, tiny_schedule("v_prediction"), store, FEW, folder=tmp_path / "run")
    (store.folder / "records-00000.safetensors").unlink()
    with pytest.raises(HollowError, match=r"is not finished\. Run precompute again"):
        train(network, schedule, store, FEW, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- DoRA ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "levers",
    [
        {},
        {"precision": "bf16", "fused_backward": True, "max_grad_norm": math.inf},
        {"precision": "fp16", "together": 2, "batch": 2},
        {"strategy": "zo"},
    ],
)
def test_a_dora_trains_its_magnitudes_whatever_the_levers(begin, tmp_path, levers):
    network, schedule, store = begin()
    network.module.to(DTYPES[levers.get("precision", "fp32")])
    targets = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")
    settings = replace(FEW, dora=True, targets=targets, **levers)
    norms = {path: layer.weight.float().flatten(1).norm(dim=1) for path, layer in network.module.named_modules()
             if path.endswith(targets)}  # fmt: skip
    result = train(network, schedule, store, settings, folder=tmp_path / "run")
    assert result.stopped == "finished"
    assert finite(result.state)
    for path, norm in norms.items():
        moved = (result.state[f"{path}.lora_magnitude_vector.weight"] - norm).abs().max()
        assert 1e-4 < moved < 1e-1, path


def test_what_was_begun_before_there_was_dora_goes_on():
    assert "dora" not in TrainSettings().fixed
    assert TrainSettings(dora=True).fixed["dora"] is True


# --- what was edited, and what is not finite ---


def edited(path, change, about=None):
    """Change the tensors of a checkpoint, and what it says beside them, as if an older version had written them."""
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["hollow.checkpoint"])
    del told["digest"]
    tensors = load_file(path)
    change(tensors, told)
    save_file(tensors, path, {"hollow.checkpoint": json.dumps(told) if about is None else about})


LORA = "lora down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
MOMENT = "optimizer backward 0 exp_avg"
EDITED = [
    (lambda tensors, told: tensors.pop("losses"), "it has no losses of its steps"),
    (lambda tensors, told: tensors.update(losses=torch.zeros(2, 2)), "it has no losses of its steps"),
    (lambda tensors, told: tensors.update(losses=torch.ones(4, dtype=torch.int64)), "it has no losses of its steps"),
    (lambda tensors, told: tensors["losses"].fill_(math.nan), "losses is not finite"),
    (lambda tensors, told: tensors[LORA].fill_(math.inf), "lora .* is not finite, as after a learning rate"),
    (lambda tensors, told: tensors.pop(LORA), "its LoRA lacks a matrix, or has one of another shape"),
    (lambda tensors, told: tensors.update({LORA: tensors[LORA].T.contiguous()}), "its LoRA lacks a matrix"),
    (lambda tensors, told: tensors.update({"lora x": tensors[LORA].clone()}), "its LoRA lacks a matrix"),
    (
        lambda tensors, told: tensors.pop(MOMENT),
        "its optimizer's state for matrix 0 lacks a part, or has one of another",
    ),
    (lambda tensors, told: tensors.update({MOMENT: torch.zeros(3)}), "its optimizer's state for matrix 0 lacks a part"),
    (
        lambda tensors, told: tensors.update({MOMENT: tensors[MOMENT].double()}),
        "its optimizer's state for matrix 0 lack",
    ),
    (lambda tensors, told: tensors.update({"optimizer backward 0 x": torch.zeros(3)}), "its optimizer's state for mat"),
    (
        lambda tensors, told: tensors.update({"optimizer backward 99 step": torch.ones(())}),
        "a state for matrix 99, but",
    ),
    (lambda tensors, told: tensors.update({"optimizer backward x step": torch.ones(())}), "a state for matrix x, but"),
    (lambda tensors, told: tensors.update({"average 0": torch.ones(3)}), "its averages are not those of its LoRA"),
    (lambda tensors, told: told.update(loss_scale="1"), "its metadata have no loss_scale that a training writes"),
    (lambda tensors, told: told.update(loss_scale=0), "its loss_scale is 0"),
    (lambda tensors, told: told.update(loss_scale=math.inf), "its loss_scale is inf"),
    (lambda tensors, told: told.pop("loss_scale"), "no loss_scale"),
    (lambda tensors, told: told.update(made_for=[]), "no made_for"),
    (lambda tensors, told: told.update(validation=[[1]]), "no validation"),
    (lambda tensors, told: told.update(digest="of another"), "it does not hold what was written"),
]


def test_an_edited_checkpoint_is_told(begin, tmp_path):
    path = tmp_path / "run" / "checkpoint.safetensors"
    whole = train(*begin(), FEW, folder=tmp_path / "run")
    before = path.read_bytes()
    assert LORA.removeprefix("lora ") in whole.state
    network, schedule, store = begin()
    for change, said in EDITED:
        path.write_bytes(before)
        edited(path, change)
        with pytest.raises(
            HollowError, match=rf"cannot be gone on from: .*{said}.* Delete it to start the training anew"
        ):
            train(network, schedule, store, FEW, folder=tmp_path / "run")
    for about in ("{", "[" * 10**5, "7", "[]", "null"):
        path.write_bytes(before)
        edited(path, lambda *_: None, about)
        with pytest.raises(HollowError, match="cannot be gone on from: its metadata"):
            train(network, schedule, store, FEW, folder=tmp_path / "run")
    path.write_bytes(before)
    edited(path, lambda *_: None)
    assert same(train(network, schedule, store, FEW, folder=tmp_path / "run").state, whole.state)


def test_one_flipped_bit_of_a_checkpoint_is_told(begin, tmp_path):
    path = tmp_path / "run" / "checkpoint.safetensors"
    network, schedule, store = begin()
    train(network, schedule, store, FEW, folder=tmp_path / "run")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(HollowError, match="cannot be gone on from: it does not hold what was written"):
        train(network, schedule, store, FEW, folder=tmp_path / "run")


def test_averages_of_a_checkpoint_are_held_against_those_of_the_training(begin, tmp_path):
    network, schedule, store = begin()
    settings = replace(FEW, ema=0.9)
    train(network, schedule, store, settings, folder=tmp_path / "run")
    edited(tmp_path / "run" / "checkpoint.safetensors", lambda tensors, told: tensors.pop("average step"))
    with pytest.raises(HollowError, match="its averages are not those of its LoRA"):
        train(network, schedule, store, settings, folder=tmp_path / "run")


def test_a_record_that_was_changed_trains_nothing(begin, tmp_path):
    network, schedule, store = begin()
    path = store.folder / "records-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        HollowError, match=r"records-00000\.safetensors does not hold what was written\. Precompute again"
    ):
        train(network, schedule, store, FEW, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_not_finite_is_said_the_record_the_network_or_the_training(begin, tmp_path):
    network, schedule, store = begin()
    result = train(network, schedule, store, replace(FEW, learning_rate=1e30), folder=tmp_path / "training")
    assert result.trouble == "The records are finite, the training is not: it went too far. Lower the learning rate."
    assert train(network, schedule, store, FEW, folder=tmp_path / "fine").trouble == ""
    poison(store, 3)
    result = train(network, schedule, store, FEW, folder=tmp_path / "record")
    assert result.stopped == "non-finite loss"
    assert re.match(r"Record 3 in .*records-00000\.safetensors is not finite\. Delete that file", result.trouble)
    network, schedule, store = begin(samples=5)
    network.module.conv_out.bias.data.fill_(math.nan)
    result = train(network, schedule, store, FEW, folder=tmp_path / "network")
    assert re.match(
        "The records are finite, but the network .* before anything is learned. Check the model", result.trouble
    )


def test_a_kill_between_a_checkpoint_and_the_file_of_its_step_loses_no_file(begin, tmp_path):
    """The checkpoint is whole then, so that nothing would make the file any more."""
    network, schedule, store = begin()
    settings, given = replace(FEW, save_every=2), {}

    def give(step, state):
        if step == 4 and step not in given:
            given[step] = None
            raise Broken
        given[step] = state

    with pytest.raises(Broken):
        train(network, schedule, store, settings, folder=tmp_path / "run", saved=give)
    train(network, schedule, store, settings, folder=tmp_path / "run", saved=give)
    whole = {}
    train(network, schedule, store, settings, folder=tmp_path / "whole", saved=whole.__setitem__)
    assert given.keys() == whole.keys() == {2, 4, 6}
    assert all(same(given[step], whole[step]) for step in whole)
