"""The learning rate along a training: diffusers' schedules, without their state."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers.optimization import get_scheduler
from tiny_training import BreakAt, Broken, content, tiny_beginning

from hollow_core.errors import HollowError
from hollow_core.lora.layers import lora_state
from hollow_core.training.optimizer import Optimizer
from hollow_core.training.rates import POWER, RESTARTS, rate_factor
from hollow_core.training.settings import TrainSettings
from hollow_core.training.train import train

FEW = TrainSettings(rank=2, steps=6, learning_rate=1e-3, lr_schedule="cosine", warmup=2)


@pytest.fixture
def begin(tmp_path):
    return partial(tiny_beginning, tmp_path / "store")


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_rates_are_those_of_diffusers_schedule_stepped_beside(name, warmup):
    theirs, ours = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    stepped = torch.optim.AdamW([theirs], lr=1.0)
    spelling = "constant_with_warmup" if (name, warmup) == ("constant", 5) else name
    counts = {"num_warmup_steps": warmup, "num_training_steps": 20, "num_cycles": RESTARTS, "power": POWER}
    schedule = get_scheduler(spelling, stepped, **counts)
    optimizer, factor = Optimizer([ours], learning_rate=1.0, weight_decay=0.0), rate_factor(name, 20, warmup)
    for step in range(20):
        optimizer.set_rate(factor(step))
        assert [group["lr"] for group in optimizer._groups()] == [group["lr"] for group in stepped.param_groups]
        stepped.step()
        schedule.step()


def test_no_two_schedules_are_the_same():
    names = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial")
    assert len({tuple(round(rate_factor(name, 20)(step), 6) for step in range(20)) for name in names}) == len(names)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_go_at_these_rates(begin, tmp_path, fused):
    """Lion moves every number by the rate."""
    pytest.importorskip("pytorch_optimizer", reason="needs the extra optimizers")
    network, schedule, store = begin()
    states = []
    settings = replace(FEW, optimizer="lion", weight_decay=0.0, fused_backward=fused, max_grad_norm=float("inf"))
    settings = replace(settings, lr_schedule="linear")
    train(
        network,
        schedule,
        store,
        settings,
        folder=tmp_path,
        progress=lambda _: states.append({key: each.clone() for key, each in lora_state(network.module).items()}),
    )
    moved = [max((after[key] - before[key]).abs().max().item() for key in after) for before, after in pairwise(states)]
    assert moved == pytest.approx([0.5e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["bp", "zo"])
def test_broken_off_and_gone_on_it_ends_with_the_same_lora(begin, tmp_path, strategy):
    settings = replace(FEW, strategy=strategy)
    train(*begin(), settings, folder=tmp_path / "whole")
    with pytest.raises(Broken):
        train(*begin(), replace(settings, save_every=2), folder=tmp_path / "run", progress=BreakAt(4))
    train(*begin(), settings, folder=tmp_path / "run")
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_a_schedule_that_falls_ends_with_its_steps(begin, tmp_path):
    train(*begin(), replace(FEW, steps=3), folder=tmp_path)
    with pytest.raises(HollowError, match=r"differs: steps \(3 there, 4 asked\)"):
        train(*begin(), replace(FEW, steps=4), folder=tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr_schedule": "exponential"}, r"lr_schedule is 'exponential'\. Choose constant, .* or polynomial"),
        ({"warmup": -1}, "warmup is -1"),
        ({"warmup": 6}, r"warmup is 6\. It must be 0 or more, and less than the 6 steps"),
    ],
)
def test_what_cannot_be_is_refused(change, said):
    with pytest.raises(HollowError, match=said):
        replace(FEW, **change)
