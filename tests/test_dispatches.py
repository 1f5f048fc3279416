"""What a step asks for beyond the U-Net's own passes, in numbers: each is time that a GPU may stand still."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from dispatches import Dispatches
from tiny_pipelines import shallow_pipeline
from tiny_unets import make_shallow_unet, make_tiny_unet

from hollow_core.lora.layers import add_lora, layers_of_any_lora, lora_off, lora_parameters
from hollow_core.lora.metadata import Recipe, recipe_for
from hollow_core.memory.dry_run import DryRun
from hollow_core.memory.setting import Setting
from hollow_core.memory.stages import OneRecord
from hollow_core.models.base_model import BaseModel, encode_prompt, outline, outline_unet
from hollow_core.nets.network import at_cut
from hollow_core.nets.transfer import Arriving
from hollow_core.nets.unet import head, hollow
from hollow_core.nets.unet_layers import exit_shape
from hollow_core.sampling.sample import SampleSettings, draw, encode_guided
from hollow_core.training.precompute import Example, run_base
from hollow_core.training.settings import TrainSettings
from hollow_core.training.steps import read_parts
from hollow_core.training.train import train

SETTINGS = TrainSettings(rank=2, steps=4)


def make_model(device: str, make: Any = make_tiny_unet) -> BaseModel:
    """By itself of SD 1.5's topology, whose attention has 256 matrices of LoRA."""
    unet = make("sd15")
    model = outline_unet(unet.config, torch.float32)
    if device == "cpu":
        model.unet = unet
    return model


def gpu(device: str) -> Any:
    return DryRun() if device == "meta" else nullcontext()


def one_step(device: str, cut: int | None, settings: TrainSettings, folder: Path) -> tuple[Dispatches, Dispatches, int]:
    """The third step's dispatches, those of the network's own forward and backward pass, and how many matrices."""
    model = make_model(device)
    store = OneRecord(model, Setting(cut, training=settings))
    network = at_cut(model.network, cut, [0])
    marks = []
    with gpu(device), Dispatches() as step:
        train(network, store.schedule, store, settings, folder=folder, progress=lambda _: marks.append(step.counts()))
    (ops, waits), (ops_before, waits_before) = marks[2], marks[1]
    step.ops, step.waits = ops - ops_before, waits - waits_before
    matrices = lora_parameters(network.module)
    for matrix in matrices:
        matrix.grad = None
    [part] = read_parts(store, store.schedule, [(0, 1.0)])
    noisy, conditioning = part.noisy.to(device), part.conditioning.to(device)
    stored = {name: tensor.to(device) for name, tensor in part.stored.items()}
    with gpu(device), Dispatches() as own:
        network.predict(noisy, part.timesteps, conditioning, stored).backward(torch.empty_like(noisy))
    return step, own, len(matrices)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(("cut", "matrices"), [(None, 256), (3, 240)])
def test_a_training_step_is_the_unets_passes_and_forty_dispatches(device, cut, matrices, tmp_path):
    """On "meta" AdamW does nothing, on the CPU it is the fused one."""
    step, own, found = one_step(device, cut, SETTINGS, tmp_path)
    assert found == matrices
    assert step.number - own.number <= 40
    assert step.waits.total() == (1 if device == "meta" else 0)  # for the loss and the gradient's norm


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 4},
        {"batch": 4, "together": 4},
        {"precision": "fp16"},
        {"max_grad_norm": float("inf"), "fused_backward": True},
        {"strategy": "zo"},
    ],
)
def test_no_training_step_waits_more_than_once(change, tmp_path):
    settings = replace(SETTINGS, **change)
    model = make_model("meta", make_shallow_unet)
    if settings.precision == "fp16":
        model.unet.half()
    store, network = OneRecord(model, Setting(1, training=settings)), model.network.hollow(1, [0])
    waits = []
    with DryRun(), Dispatches() as asked:
        train(
            network,
            store.schedule,
            store,
            settings,
            folder=tmp_path,
            progress=lambda _: waits.append(asked.waits.total()),
        )
    assert {after - before for before, after in pairwise(waits)} == {1}


def test_precomputing_waits_for_nothing():
    model = make_model("meta", make_shallow_unet)
    store = OneRecord(model, Setting(None))
    latents, prompt = store.inputs(0)
    base, example = model.network.base(1), Example(latents, prompt, prompt, "", "")
    with DryRun(), Dispatches() as own:
        step = torch.empty(2, dtype=torch.int64, device="meta")
        told = prompt.to("meta").encoder_hidden_states.expand(2, -1, -1)
        with torch.no_grad():
            base.module(latents.to("meta").expand(2, -1, -1, -1), step, told)
    with DryRun(), Dispatches() as asked:
        Arriving(run_base(base, store.schedule, [store.records[0]] * 2, [example] * 2))
    assert not asked.waits
    assert asked.number - own.number <= 30  # ten of them make the noise of a record


@pytest.mark.parametrize("refresh", [1, 2])
def test_a_sampler_step_on_two_paths_waits_no_more_than_on_one(refresh, tmp_path):
    """And asks for seven things at most beyond what the two paths through the U-Net do: one is a copy of the
    activation, which others may write into."""
    shallow_pipeline("sd15").save_pretrained(tmp_path)
    recipe, steps = recipe_for(1, "sks", "dog", "epsilon"), 4

    def draw_steps(number: int, recipe: Recipe | None) -> Dispatches:
        model = outline(str(tmp_path))
        add_lora(model.unet, 2, generator=torch.Generator())
        settings = SampleSettings(number, size=(128, 128), refresh=refresh)
        with DryRun():
            text = encode_guided(model, "a sks dog", settings)
            generic = encode_prompt(model, "a dog", settings.size).to("cpu")
        with DryRun(), Dispatches() as asked:
            draw(model, text, [0], settings, recipe, generic)
        return asked

    few, many = ([draw_steps(number, way) for way in (None, recipe)] for number in (steps, 2 * steps))
    one, two = (longer.waits - shorter.waits for longer, shorter in zip(many, few, strict=True))
    assert two == one
    one, two = (longer.number - shorter.number for longer, shorter in zip(many, few, strict=True))
    whole, base, personal = passes(outline(str(tmp_path)))
    # in a dry run all time steps are the same one, and so due
    assert two - one <= steps * (base + personal - whole + 7)


def passes(model: BaseModel) -> list[int]:
    """The dispatches of the whole U-Net with a LoRA, of the base path without, and of the hollowed U-Net with it."""
    unet = model.unet
    add_lora(unet, 2, generator=torch.Generator())
    latents, prompt = model.network.inputs(16, 16)
    given = latents.to("meta").repeat(2, 1, 1, 1), torch.empty((), dtype=torch.int64, device="meta")
    told = prompt.to("meta").encoder_hidden_states.repeat(2, 1, 1)
    exit_activation = torch.empty(2, *exit_shape(unet.config, 1, 16, 16), device="meta")

    def count(view: Any, **handed_in: Any) -> int:
        with DryRun(), Dispatches() as asked, torch.no_grad():
            view(*given, told, **handed_in)
        return asked.number

    with lora_off(layers_of_any_lora(unet)):
        base = count(head(unet, 1))
    return [count(unet), base, count(hollow(unet, 1, timesteps=None), exit_activation=exit_activation)]
