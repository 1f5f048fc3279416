"""The real front end, in headless Chromium: every graph of workflows/ says what its copy in tests/workflows runs, and
pictures are uploaded."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("comfy", reason="COMFYUI_DIR names no checkout of ComfyUI")

from comfyui_server import Server
from PIL import Image

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


@pytest.fixture(params=[False, True], ids=["canvas", "Nodes 2.0"])
def load_pictures(page: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page with one Load Pictures node, `shown`, in it."""
    switch = "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    page.evaluate(switch, request.param)
    page.evaluate(
        """async () => {
            await app.loadGraphData({version: 0.4, nodes: [], links: []});
            window.shown = LiteGraph.createNode("HollowLoadPictures");
            app.graph.add(shown);
        }"""
    )
    yield page
    page.evaluate(switch, False)


def choose(page: Any, folder: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.evaluate("shown.widgets.find(widget => widget.type === 'button').callback()")
    chooser.value.set_files(folder)


def chosen(page: Any, folder: str) -> None:
    """Returns as soon as the node has `folder` chosen, out of those that it lists."""
    page.wait_for_function(
        "folder => shown.widgets[0].value === folder && shown.widgets[0].options.values.includes(folder)", arg=folder
    )


def toast(page: Any, text: str) -> str:
    """The whole of the one that holds `text`."""
    return str(page.locator("[role=alert], [data-sonner-toast]").filter(has_text=text).first.inner_text())


def test_a_folder_is_uploaded_and_chosen(load_pictures: Any, server: Server, tmp_path: Path) -> None:
    """Its pictures and their texts, and nothing else; a second one of the same name is kept apart."""
    folder = tmp_path / "my dog"
    (folder / "nested").mkdir(parents=True)
    for name in ("a.png", "b.JPG", "nested/c.png", ".hidden.png"):
        Image.new("RGB", (64, 64)).save(folder / name)
    for name in ("a.txt", "a.caption", "notes.txt", "notes.md"):
        (folder / name).write_text("a photo of a sks dog")
    inputs = server.folder / "input"
    known = len([*inputs.glob("my dog*")])
    for number in (known + 1, known + 2):
        name = "my dog" if number == 1 else f"my dog {number}"
        choose(load_pictures, folder)
        chosen(load_pictures, name)
        assert sorted(path.name for path in (inputs / name).iterdir()) == ["a.caption", "a.png", "a.txt", "b.JPG"]
    saved = load_pictures.evaluate(
        "async () => [shown.serialize().widgets_values, (await app.graphToPrompt()).output[shown.id].inputs]"
    )
    values = [name, 512, True, "a photo of a sks dog", False]
    names = ("folder", "resolution", "square", "caption", "alpha_mask")
    assert saved == [values, dict(zip(names, values, strict=True))]


def test_dropped_pictures_are_uploaded(load_pictures: Any, server: Server) -> None:
    inputs = server.folder / "input"
    known = len([*inputs.glob("pictures*")])
    taken = load_pictures.evaluate(
        """() => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File(["no picture"], "notes.md"));
            const refused = shown.onDragDrop({dataTransfer});
            dataTransfer.items.add(new File([Uint8Array.from(atob(
                "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
            ), byte => byte.charCodeAt(0))], "dot.png"));
            return [refused, shown.onDragOver({dataTransfer}), shown.onDragDrop({dataTransfer})];
        }"""
    )
    assert taken == [False, True, True]
    name = "pictures" if known == 0 else f"pictures {known + 1}"
    chosen(load_pictures, name)
    assert [path.name for path in (inputs / name).iterdir()] == ["dot.png"]


def test_what_could_not_be_uploaded_is_said(load_pictures: Any, tmp_path: Path) -> None:
    folder = tmp_path / "refused"
    folder.mkdir()
    before = load_pictures.evaluate("shown.widgets[0].value")
    (folder / "notes.txt").write_text("no picture")
    choose(load_pictures, folder)
    assert "refused holds no pictures. Choose the one that does." in toast(load_pictures, "Nothing was uploaded")

    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(folder / name)
    load_pictures.route(
        "**/upload/image",
        lambda route: route.fulfill(status=413) if b"b.png" in route.request.post_data_buffer else route.continue_(),
    )
    choose(load_pictures, folder)
    said = toast(load_pictures, "b.png was not uploaded")
    load_pictures.unroute("**/upload/image")
    assert "The server answered 413" in said
    assert "1 of 2 files are in input/refused" in said
    assert load_pictures.evaluate("shown.widgets[0].value") == before
