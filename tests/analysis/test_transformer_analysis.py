"""A transformer's LoRA, block by block: its figures, the hollowed ends, the cut, and what scales its blocks."""

from pathlib import Path

import pytest
import torch
from tiny_transformers import FAMILY_NAMES, tiny_transformer
from torch import Tensor

from hollow_core.analysis.base_weights import base_weights
from hollow_core.analysis.block_weights import parse_block_weights, scale_file
from hollow_core.analysis.figures import figures
from hollow_core.analysis.picture import picture
from hollow_core.analysis.report import Analysis, analyze, analyze_files, suggest
from hollow_core.errors import HollowError
from hollow_core.lora import file as lora_file
from hollow_core.lora.dialects import parse
from hollow_core.lora.file import read
from hollow_core.lora.layers import add_lora, lora_state, named_lora_parameters, remove_lora
from hollow_core.lora.metadata import recipe_for
from hollow_core.nets.network import Cut
from hollow_core.nets.transformer import Transformer


def trained(network: Transformer, cut: Cut | None = None) -> dict[str, Tensor]:
    """On the attention of what a cut leaves; the ends change a hundredth as much as the rest."""
    hollowed, generator = network if cut is None else network.hollow(cut, None), torch.Generator().manual_seed(0)
    add_lora(hollowed.module, 2, None, network.family.attention, within=hollowed.within, generator=generator)
    ends = tuple(f"{path}." for path in network.blocks((1, 1)))
    for name, matrix in named_lora_parameters(hollowed.module).items():
        matrix.data.normal_(0, 0.1 if name.startswith(ends) else 1.0, generator=generator)
    state = lora_state(hollowed.module)
    remove_lora(hollowed.module)
    return state


def saved(folder: Path, network: Transformer, cut: Cut | None) -> Path:
    recipe = recipe_for(cut, "sks", "dog", "flow")
    path = folder / "rex.safetensors"
    lora_file.save(path, trained(network, cut), network.config, alpha=2.0, layout="any", recipe=recipe)
    return path


def analysis_of(path: Path, network: Transformer) -> Analysis:
    lora, metadata = read(path, network.config)
    recipe = lora_file.recipe_of(metadata)
    assert recipe is not None
    return analyze(path.stem, lora.layers, network.config, cut=recipe.cut)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_block_in_the_order_in_which_they_run(tmp_path: Path, name: str) -> None:
    network = tiny_transformer(name)
    row = analysis_of(saved(tmp_path, network, (1, 1)), network).row()
    hollowed = [block["module"] for block in row["blocks"] if block["hollowed"]]
    assert hollowed == [path for path in network.blocks((1, 1)) if "refiner" not in path]
    assert [block["mean"] is None for block in row["blocks"]] == [block["hollowed"] for block in row["blocks"]]
    assert [block["block"] for block in row["blocks"]] == [str(number) for number in range(len(row["blocks"]))]
    assert sum(block["share"] for block in row["blocks"]) == pytest.approx(1.0)
    assert all(found["mean"] for found in row["projections"].values())


def test_the_cut_whose_ends_hold_little_is_recommended(tmp_path: Path) -> None:
    network = tiny_transformer("krea2")
    analysis = analysis_of(saved(tmp_path, network, None), network)
    found = suggest([analysis])
    assert found is not None
    assert found.cut == (1, 1)
    assert found.share == analysis.hollow_share((1, 1)) < 0.1
    assert found.block_weights == "0=0,3=0"
    result = figures([analysis])
    assert result["suggestions"][0]["training_bytes"] is None


@pytest.mark.slow
def test_a_column_is_drawn_as_high_as_there_are_blocks(tmp_path: Path) -> None:
    network = tiny_transformer("krea2")
    path = saved(tmp_path, network, (1, 1))
    (drawn,) = [picture([analysis_of(path, network)])]
    deeper = tiny_transformer("flux")
    assert picture([analysis_of(saved(tmp_path, deeper, (1, 1)), deeper)] * 2).size > drawn.size


def test_in_relation_to_the_weights_of_a_folder(tmp_path: Path) -> None:
    network = tiny_transformer("flux")
    path = saved(tmp_path, network, None)
    network.module.save_pretrained(tmp_path / "model" / "transformer")
    lora, _ = read(path, network.config)
    base = base_weights(tmp_path / "model", network.config)
    whole = analyze("rex", lora.layers, network.config, base=base).whole()
    squares = [network.module.get_submodule(module).weight.square().sum() for module in lora.layers]
    assert whole.base_squared == pytest.approx(float(sum(squares)), rel=1e-5)
    with pytest.raises(HollowError, match=r"is one file\. Give the diffusers folder of FLUX\.1"):
        base_weights(path, network.config)


def test_blocks_are_scaled_by_their_numbers(tmp_path: Path) -> None:
    network = tiny_transformer("flux")
    config = network.config
    path = saved(tmp_path, network, None)
    text = "0=0, 3=0.5, transformer_blocks.1=2"
    written = scale_file(path, tmp_path / "b.safetensors", text, config=config, dtype=torch.float32)
    before, after = (parse(lora_file.read_safetensors(each)[0], config).layers for each in (path, written.path))
    factors = {
        "transformer_blocks.0.": 0.0,
        "transformer_blocks.1.": 2.0,
        "single_transformer_blocks.1.": 0.5,
    }
    for module, layer in before.items():
        factor = next((factor for name, factor in factors.items() if module.startswith(name)), 1.0)
        same = after[module].scale * after[module].up @ after[module].down
        assert torch.allclose(same, factor * layer.scale * layer.up @ layer.down, atol=1e-4), module
    for wrong, sentence in (
        ("1,0,1", r"'1,0,1' names no block of FLUX\.1\. Name them by number, as in 12=0\.5"),
        ("57=0", r"FLUX\.1 has no block '57'\. Name it as 12 or single_transformer_blocks\.2"),
    ):
        with pytest.raises(HollowError, match=sentence):
            parse_block_weights(wrong, config)


def test_a_file_of_no_public_size_needs_its_model(tmp_path: Path) -> None:
    path = saved(tmp_path, tiny_transformer("krea2"), None)
    with pytest.raises(HollowError, match=r"The LoRA is for krea2, but of another size than the public model\."):
        analyze_files([path])
