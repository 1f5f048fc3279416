"""LoRA files of transformers: what is written is read back, by us, by diffusers and, where it can, by others."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft.tuners.lora import LoraLayer as PeftLayer
from tiny_transformers import FAMILY_NAMES, tiny_transformer
from torch import Tensor

from hollow_core.lora import file as lora_file
from hollow_core.lora.layers import add_lora, lora_state, named_lora_parameters, remove_lora
from hollow_core.lora.metadata import layout_of, recipe_for
from hollow_core.nets.families import FAMILIES
from hollow_core.nets.transformer import Transformer

DIALECTS = [(family.name, dialect) for family in FAMILIES.values() for dialect in family.dialects]

RECIPE = recipe_for((1, 1), "sks", "dog", "flow")


def trained(network: Transformer, rank: int = 2, alpha: float = 3.0, *, everywhere: bool = False) -> dict[str, Tensor]:
    """A LoRA as training leaves it, on what is left at (1, 1)."""
    hollowed, generator = network.hollow((1, 1), None), torch.Generator().manual_seed(0)
    targets = network.family.attention + (network.family.feed_forward if everywhere else ())
    add_lora(hollowed.module, rank, alpha, targets, within=hollowed.within, generator=generator)
    for matrix in named_lora_parameters(hollowed.module).values():
        matrix.data.normal_(0, 0.3, generator=generator)
    state = lora_state(hollowed.module)
    remove_lora(hollowed.module)
    return state


def changes(state: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """{layer: ΔW}"""
    return {
        key.removesuffix(".lora_A.weight"): alpha / len(down) * state[key.replace("lora_A", "lora_B")] @ down
        for key, down in state.items()
        if key.endswith("lora_A.weight")
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-3) -> None:
    assert found.keys() == expected.keys()
    for module, change in expected.items():
        assert float((found[module] - change).norm()) <= tolerance * float(change.norm()), module


def pipeline_with(network: Transformer) -> Any:
    """The family's own, of the transformer alone."""
    kind = getattr(diffusers, network.family.pipelines[0])
    if issubclass(kind, diffusers.ModularPipeline):
        pipeline = kind()
        pipeline.update_components(transformer=network.module)
        return pipeline
    parameters = list(inspect.signature(kind).parameters.values())
    needed = {parameter.name: None for parameter in parameters if parameter.default is parameter.empty}
    return kind(**needed | {"transformer": network.module})


@pytest.mark.parametrize(("name", "dialect"), DIALECTS)
def test_what_is_written_is_read_back(tmp_path: Path, name: str, dialect: str) -> None:
    network = tiny_transformer(name)
    state = trained(network, everywhere=True)
    first = tmp_path / "first.safetensors"
    written = lora_file.save(first, state, network.config, alpha=3.0, layout="any", recipe=RECIPE)
    assert written.dialect == network.family.dialects[0]
    assert f"layers of {network.family.title}, every key matched; the largest |ΔW| is" in written.sentence
    path = tmp_path / ("a" if dialect == "peft" else "a.safetensors")
    again = lora_file.convert(first, path, dialect, config=network.config)
    assert again.layers == written.layers == len(changes(state, 3.0))
    assert again.largest == pytest.approx(written.largest, rel=1e-2)
    loaded = lora_file.load(path, network.module)
    assert_same(changes(loaded.state, loaded.alpha), changes(state, 3.0))
    assert loaded.recipe == RECIPE
    assert layout_of(loaded.metadata) == name


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_diffusers_takes_every_key_of_what_is_saved(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    network = tiny_transformer(name)
    state = trained(network, everywhere=True)
    path = tmp_path / "a.safetensors"
    lora_file.save(path, state, network.config, alpha=3.0, layout="any", recipe=RECIPE)
    pipeline = pipeline_with(network)
    with caplog.at_level("WARNING"):
        caplog.clear()
        pipeline.load_lora_weights(path)
    found = {
        path: layer.get_delta_weight(layer.active_adapters[0]).detach()
        for path, layer in network.module.named_modules()
        if isinstance(layer, PeftLayer)
    }
    assert_same(found, changes(state, 3.0))
    assert all(record.message.startswith("No LoRA keys associated to NoneType") for record in caplog.records)
