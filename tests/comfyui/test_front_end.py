"""Every graph of workflows/ in the real front end, in headless Chromium, says what its copy in tests/workflows runs."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("comfy", reason="COMFYUI_DIR names no checkout of ComfyUI")

from comfyui_server import Server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

ROOT = Path(__file__).parents[2]
GRAPHS = sorted((ROOT / "workflows").glob("*.json"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Any]:
    """The front end, ready."""
    if CHROMIUM is None:
        pytest.skip("There is no Chromium on the PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1900, "height": 1150})
        page.goto(server.url)
        page.wait_for_function("window.app?.graph && window.app.extensionManager")
        page.wait_for_function("'HollowUNet' in LiteGraph.registered_node_types")
        yield page
        browser.close()


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_a_graph_loads_whole_and_says_what_its_copy_runs(page: Any, server: Server, path: Path) -> None:
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    found = page.evaluate(
        """async graph => {
            await app.loadGraphData(graph);
            const missing = app.graph.nodes.filter(node => !LiteGraph.registered_node_types[node.type]);
            return {missing: missing.map(node => node.type), prompt: (await app.graphToPrompt()).output};
        }""",
        json.loads(path.read_text()),
    )
    assert found["missing"] == []
    # example pictures and previews that are not there are no error of the graph
    assert [text for text in complaints if "Failed to load resource" not in text] == []
    copy = json.loads((ROOT / "tests" / "workflows" / path.name).read_text())
    assert found["prompt"].keys() == copy.keys()
    host = json.loads(server.get("object_info"))
    for node, expected in copy.items():
        assert found["prompt"][node]["class_type"] == expected["class_type"]
        known = {name for inputs in host[expected["class_type"]]["input"].values() for name in inputs}
        wanted = {name: value for name, value in expected["inputs"].items() if name in known}  # newer ones have more
        inputs = found["prompt"][node]["inputs"]
        assert {name: inputs.get(name) for name in wanted} == wanted, node


def test_a_new_training_node_keeps_its_seed(page: Any) -> None:
    """The front end draws a new one after each run for any input called seed, unless told not to."""
    widgets = page.evaluate(
        """() => ["HollowPrecompute", "HollowTrainLoRA"].map(
            type => LiteGraph.createNode(type).widgets.map(widget => widget.name))"""
    )
    for names in widgets:
        assert "seed" in names
        assert "control_after_generate" not in names
