"""Blocks of a LoRA switched off one by one, on a tiny pipeline."""

import torch
from PIL import ImageChops
from tiny_pipelines import tiny_pipeline

from hollow_core.analysis.ablation import ablate, grid
from hollow_core.lora.file import LoraFile
from hollow_core.models.base_model import BaseModel
from hollow_core.nets.unet_layers import layers
from hollow_core.sampling.sample import SampleSettings, sample


def test_each_block_is_off_in_turn() -> None:
    pipeline = tiny_pipeline("sd15")
    model = BaseModel(
        pipeline.unet, pipeline.vae, (pipeline.text_encoder,), (pipeline.tokenizer,), pipeline.scheduler, "sd15", 128
    )
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    strong, idle = "up_blocks.3.resnets.2.conv1", "mid_block.resnets.0.conv1"
    for name, gain in ((strong, 1.0), (idle, 0.0)):
        out, into, *kernel = model.unet.get_submodule(name).weight.shape
        state[f"{name}.lora_A.weight"] = torch.randn(2, into, *kernel, generator=generator)
        state[f"{name}.lora_B.weight"] = gain * torch.randn(out, 2, 1, 1, generator=generator)
    before = {key: matrix.clone() for key, matrix in state.items()}
    settings = SampleSettings(steps=2, guidance=1.0)
    asked: list[tuple[int, int]] = []
    done = ablate(
        model,
        LoraFile(state, 2.0, None, {}),
        "a cup",
        3,
        settings,
        progress=lambda number, of: asked.append((number, of)),
    )
    assert [block.name for block in done.without] == ["5-1", "9-3"]
    off = {block.name: picture for block, picture in done.without.items()}
    assert done.influence(off["5-1"]) == 0
    assert done.influence(off["9-3"]) > 0
    assert ImageChops.difference(off["9-3"], done.base).getbbox() is None  # without it nothing is left
    assert ImageChops.difference(done.base, sample(model, ["a cup"], [3], settings)[0]).getbbox() is None
    assert asked == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(torch.equal(before[key], state[key]) for key in state)
    assert {block.name for block in done.without} <= {layer.name for layer in layers(model.unet.config)}
    assert grid(done, "a cup").width > 4 * 128
    of_inputs = {key: matrix for key, matrix in state.items() if key.startswith(strong)}
    of_inputs[f"{strong}.lora_magnitude_vector.weight"] = torch.ones(1, len(state[f"{strong}.lora_A.weight"][0]))
    alone = ablate(model, LoraFile(of_inputs, 2.0, None, {}), "a cup", 3, settings)
    [left] = alone.without.values()
    assert ImageChops.difference(left, done.base).getbbox() is None
    assert alone.influence(left) > 0
