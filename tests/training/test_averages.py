"""The LoRA that is given out, where it is another than the one that is trained: EMA, and schedule-free's."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import BreakAt, Broken, content, same, tiny_beginning

from hollow_core.errors import HollowError
from hollow_core.lora.layers import lora_state
from hollow_core.memory.planner import Planner
from hollow_core.memory.setting import Setting
from hollow_core.training.settings import TrainSettings
from hollow_core.training.train import train

EMA = TrainSettings(rank=2, steps=6, learning_rate=1e-2, ema=0.3)
FREE = TrainSettings(rank=2, steps=6, learning_rate=1e-2, optimizer="schedulefree")


@pytest.fixture
def begin(tmp_path):
    return partial(tiny_beginning, tmp_path / "store")


def trained(folder):
    """The LoRA of a checkpoint."""
    saved = load_file(folder / "checkpoint.safetensors")
    return {name.removeprefix("lora "): tensor for name, tensor in saved.items() if name.startswith("lora ")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ema_is_the_average_over_the_steps(begin, tmp_path, precision):
    network, schedule, store = begin()
    states = []
    settings = replace(EMA, lora_precision=precision)
    result = train(
        network,
        schedule,
        store,
        settings,
        folder=tmp_path,
        progress=lambda _: states.append({key: each.double() for key, each in lora_state(network.module).items()}),
    )
    average = states[0]
    for step, state in enumerate(states[1:], 1):
        decay = min(0.3, (1 + step) / (10 + step))
        average = {key: decay * average[key] + (1 - decay) * state[key] for key in state}
    for key, tensor in result.state.items():
        torch.testing.assert_close(tensor.double(), average[key], rtol=1e-5 if precision == "fp32" else 4e-3, atol=1e-8)
    assert same(lora_state(network.module), result.state)
    assert not same(trained(tmp_path), result.state)  # so it goes on from what was trained


def test_schedule_frees_average_is_given_out(begin, tmp_path):
    pytest.importorskip("pytorch_optimizer", reason="needs the extra optimizers")
    result = train(*begin(), FREE, folder=tmp_path)
    saved = load_file(tmp_path / "checkpoint.safetensors")
    for index, key in enumerate(result.state):
        y, z = saved[f"lora {key}"], saved[f"optimizer backward {index} z"]
        x = (y - 0.1 * z) / 0.9  # y = 0.9 x + 0.1 z, in its paper's names
        torch.testing.assert_close(result.state[key], x, rtol=1e-4, atol=1e-7)
    assert not same(trained(tmp_path), result.state)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [EMA, FREE, replace(EMA, ema=None)])
def test_on_the_way_the_lora_as_used_is_the_one_that_would_come_out(begin, tmp_path, settings):
    if settings.optimizer == "schedulefree":
        pytest.importorskip("pytorch_optimizer", reason="needs the extra optimizers")
    network, schedule, store = begin()
    seen = []

    def look(done):
        before = lora_state(network.module)
        before = {key: tensor.clone() for key, tensor in before.items()}
        with done.as_used():
            seen.append({key: tensor.clone() for key, tensor in lora_state(network.module).items()})
        assert same(lora_state(network.module), before)

    looked = train(network, schedule, store, settings, folder=tmp_path / "looked", progress=look)
    ended = train(*begin(), replace(settings, steps=3), folder=tmp_path / "ended")
    assert same(seen[2], ended.state)
    assert same(train(*begin(), settings, folder=tmp_path / "not looked").state, looked.state)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_broken_off_and_gone_on_ema_ends_with_the_same_lora(begin, tmp_path, precision):
    settings = replace(EMA, lora_precision=precision)
    whole = train(*begin(), settings, folder=tmp_path / "whole")
    with pytest.raises(Broken):
        train(*begin(), replace(settings, save_every=2), folder=tmp_path / "run", progress=BreakAt(4))
    with pytest.raises(HollowError, match=r"differs: ema \(0\.3 there, None asked\)"):
        train(*begin(), replace(settings, ema=None), folder=tmp_path / "run")
    result = train(*begin(), settings, folder=tmp_path / "run")
    assert same(result.state, whole.state)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


@pytest.mark.slow
def test_a_plan_counts_emas_copy():
    def needed(**changes):
        training = TrainSettings(rank=16, precision="bf16", gradient_checkpointing=True, **changes)
        return planner.peak("train", Setting(3, training=training))

    planner = Planner("sd15")
    without, with_ema = needed(), needed(ema=0.99)
    assert with_ema.total - without.total == pytest.approx(without.bytes["lora"], rel=1e-3)


@pytest.mark.parametrize("ema", [0.0, 1.0])
def test_a_decay_that_averages_nothing_is_refused(ema):
    with pytest.raises(HollowError, match=rf"ema is {ema}\. It must be between 0 and 1, such as 0\.99"):
        TrainSettings(ema=ema)
