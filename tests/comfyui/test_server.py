"""The pack in a running ComfyUI: what it costs at the start, what it shows, and the quickstart from end to end."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("comfy", reason="COMFYUI_DIR names no checkout of ComfyUI")

from comfyui_server import Server
from PIL import Image

from hollow_core.demo import run, world

ROOT = Path(__file__).parents[2]
GRAPHS = sorted((ROOT / "workflows").glob("*.json"))
COPIES = ROOT / "tests" / "workflows"  # of GRAPHS, in API format
QUICKSTART = COPIES / "Hollow quickstart.json"
LOADERS = {"CheckpointLoaderSimple", "ControlNetLoader", "HollowLoadLoRA", "LoadImage"}


def test_the_pack_costs_less_than_a_third_of_a_second_at_the_start(server: Server) -> None:
    seconds = re.search(r"([\d.]+) seconds: .*custom_nodes.hollow", server.log.read_text())  # by ComfyUI's own count
    assert seconds is not None
    assert float(seconds[1]) < 0.3
    assert "IMPORT FAILED): " not in server.log.read_text()


def test_the_template_browser_offers_every_graph_with_its_picture(server: Server) -> None:
    offered = json.loads(server.get("workflow_templates"))["hollow"]
    assert sorted(offered) == [path.stem for path in GRAPHS]
    for path in GRAPHS:
        name = path.stem.replace(" ", "%20")
        assert json.loads(server.get(f"api/workflow_templates/hollow/{name}.json"))["nodes"]
        with Image.open(path.with_suffix(".jpg")) as thumbnail:
            assert max(thumbnail.size) <= 800


def test_every_node_has_its_help_page_with_a_picture(server: Server) -> None:
    nodes = [name for name, node in json.loads(server.get("object_info")).items() if node["category"] == "Hollow"]
    assert nodes
    for name in nodes:
        page = server.get(f"extensions/hollow/docs/{name}.md").decode()
        [picture] = re.findall(r"!\[.+\]\((.+)\)", page)
        assert server.get(f"extensions/hollow/docs/{picture}")[:3] == b"\xff\xd8\xff"  # JPEG


def test_the_quickstart_draws_the_subject(server: Server) -> None:
    graph = json.loads(QUICKSTART.read_text())
    ran = server.run(graph)
    subject = world.HELD_OUT[0]
    for node in ("13", "17"):  # on two paths, and as an ordinary LoRA
        drawn = [picture.resize((world.SIZE, world.SIZE)) for picture in server.pictures(ran, node)]
        subject_score, prompt_score = run.score(drawn, subject, ["night"] * len(drawn))
        assert subject_score > 0.5  # as `hollow demo`; the base model has about 0
        assert prompt_score > 0.9
    assert (server.folder / "models" / "loras" / "hollow" / "quickstart.safetensors").exists()

    # one step more: nothing is precomputed again, and training goes on where it ended
    graph["6"]["inputs"]["steps"] += 1
    graph = {node: graph[node] for node in ["1", "2", "3", "4", "5", "6", "7", "9", "18", "19"]}
    again = server.run(graph)
    assert {"2", "3", "5", "19"} <= set(again.messages["execution_cached"]["nodes"])
    assert "6" not in again.messages["execution_cached"]["nodes"]


def complaints(server: Server, graph: dict[str, Any]) -> set[tuple[str, str]]:
    """The node and the kind of each of the server's, for a graph that ends soon: it lacks its files."""
    nodes = server.queue(graph)["node_errors"].values()
    return {(node["class_type"], error["type"]) for node in nodes for error in node["errors"]}


@pytest.mark.parametrize("path", sorted({*COPIES.glob("*.json")} - {QUICKSTART}), ids=lambda path: path.stem)
def test_graphs_lack_nothing_but_files(server: Server, path: Path) -> None:
    found = complaints(server, json.loads(path.read_text()))
    assert {node for node, _ in found} <= LOADERS
    assert {kind for _, kind in found} <= {"value_not_in_list", "custom_validation_failed"}


def test_saved_graphs_may_call_all_layers_as_they_did(server: Server) -> None:
    graph = json.loads((COPIES / "Hollow SDXL.json").read_text())
    train = next(node for node in graph.values() if node["class_type"] == "HollowTrainLoRA")
    train["inputs"]["layers"] = "attention, convolutions and feed-forward"
    assert "HollowTrainLoRA" not in {node for node, _ in complaints(server, graph)}
    train["inputs"]["layers"] = "some"
    assert ("HollowTrainLoRA", "custom_validation_failed") in complaints(server, graph)


def test_what_a_cached_node_shows_is_shown_again(server: Server) -> None:
    if "has_intermediate_output" not in json.loads(server.get("object_info/HollowUNet"))["HollowUNet"]:
        pytest.skip("This ComfyUI shows a cached node's output again only where it ends the graph")
    graph = json.loads(QUICKSTART.read_text())
    graph = {node: graph[node] for node in ["1", "2", "3", "4", "5", "6", "7"]}
    del graph["5"]["inputs"]["class_latents"]
    graph["5"]["inputs"] |= {"samples": 5, "name": "cached"}
    graph["6"]["inputs"] |= {"steps": 2, "batch": 1}
    first, second = server.run(graph), server.run(graph)
    assert {"4", "5", "6"} <= set(second.messages["execution_cached"]["nodes"])
    assert second.outputs == first.outputs
    assert second.outputs["4"]["images"]
    assert second.outputs["5"]["text"][0].startswith("5 records in output/hollow/cached:\nall new")
    assert second.outputs["6"]["images"]
    assert second.outputs["6"]["text"][0].startswith("2 steps: all new")
