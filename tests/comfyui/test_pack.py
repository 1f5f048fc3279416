"""The pack as ComfyUI sees it: its nodes, by the names that shared graphs know for ever."""

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("comfy", reason="COMFYUI_DIR names no checkout of ComfyUI")

import hollow_pack

NAMES = {
    "HollowUNet": "Hollow U-Net",
    "HollowPrecompute": "Precompute Activations",
    "HollowTrainLoRA": "Train Hollowed LoRA",
    "HollowTwoPathSampler": "Two-Path Sampler",
    "HollowTwoPathModel": "Two-Path Model",
    "HollowLayerWeightAnalyzer": "Layer Weight Analyzer",
    "HollowSaveLoRA": "Save Hollowed LoRA",
    "HollowLoadLoRA": "Load Hollowed LoRA",
    "HollowSplitPrompt": "Split Prompt",
    "HollowDemoModel": "Hollow Demo Model",
}


async def _schemas() -> dict[str, object]:
    extension = await hollow_pack.comfy_entrypoint()
    return {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in await extension.get_node_list()}


def test_every_node_has_the_name_that_shared_graphs_know() -> None:
    schemas = asyncio.run(_schemas())
    assert {node_id: schema.display_name for node_id, schema in schemas.items()} == NAMES
    assert {schema.category for schema in schemas.values()} == {"Hollow"}


def test_every_input_says_what_to_choose() -> None:
    for node_id, schema in asyncio.run(_schemas()).items():
        silent = [given.id for given in schema.inputs if not given.tooltip]
        assert not silent, node_id


def test_every_node_has_a_help_page() -> None:
    docs = Path(hollow_pack.__file__).parent / hollow_pack.WEB_DIRECTORY / "docs"
    for node_id, name in NAMES.items():
        assert (docs / f"{node_id}.md").read_text().startswith(f"# {name}\n")
