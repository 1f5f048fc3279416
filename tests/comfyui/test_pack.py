"""The pack as ComfyUI sees it."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("comfy", reason="COMFYUI_DIR names no checkout of ComfyUI")

import hollow_pack
from node_schemas import KNOWN, summary


async def _schemas() -> list[object]:
    extension = await hollow_pack.comfy_entrypoint()
    return [node.GET_SCHEMA() for node in await extension.get_node_list()]


def test_nodes_are_what_shared_graphs_know() -> None:
    assert summary(asyncio.run(_schemas())) == KNOWN


def test_nothing_heavy_is_imported_before_a_node_runs() -> None:
    code = """
import asyncio, sys
import conftest  # loads ComfyUI and the pack
nodes = asyncio.run(asyncio.run(sys.modules["hollow_pack"].comfy_entrypoint()).get_node_list())
schemas = [node.GET_SCHEMA() for node in nodes]
print([name for name in ("diffusers", "peft", "matplotlib", "rich") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
