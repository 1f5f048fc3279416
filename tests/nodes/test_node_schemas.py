"""The nodes' schemas without ComfyUI, whose schema classes are stood in for: tests/comfyui asks the real ones."""

import asyncio
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from node_schemas import KNOWN, summary

ROOT = Path(__file__).parents[2]


class _Type:
    """`io.Int`, `io.Custom("HOLLOW_UNET")` …: its Input and Output keep what they are told."""

    def __init__(self, io_type: str) -> None:
        self.io_type = io_type

    def Input(self, name: str, **told: Any) -> SimpleNamespace:
        return SimpleNamespace(**{"id": name, "io_type": self.io_type, "optional": False} | told)

    def Output(self, name: str, **told: Any) -> SimpleNamespace:
        return SimpleNamespace(id=name, io_type=self.io_type, **told)


class _Io(ModuleType):
    Custom = _Type
    ComfyNode = object
    Schema = staticmethod(lambda **told: SimpleNamespace(**told))
    NodeOutput = None
    Hidden = SimpleNamespace(unique_id="UNIQUE_ID")

    def __getattr__(self, name: str) -> _Type:
        return _Type(name.upper())


def _stand_in(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    return module


@pytest.fixture
def schemas(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Of every node, in the order of the pack."""
    pack = "hollow_schemas"
    lists: dict[str, Callable[[], list[str]] | list[str]] = {
        "SAMPLERS": [],
        "SCHEDULERS": [],
        "known_loras": lambda: [],
        "picture_folders": lambda: [],
    }
    for name, module in {
        "comfy_api": _stand_in("comfy_api"),
        "comfy_api.v0_0_2": _stand_in("comfy_api.v0_0_2", ComfyExtension=object, io=_Io("io")),
        f"{pack}.nodes.host.sampling": _stand_in("sampling", **lists),
        f"{pack}.nodes.host.files": _stand_in("files", **lists),
        f"{pack}.nodes.host.load_pictures": _stand_in("load_pictures", **lists),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location(pack, ROOT / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, pack, module)
    spec.loader.exec_module(module)
    nodes = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
    found = [node.define_schema() for node in nodes]
    for name in [name for name in sys.modules if name.startswith(f"{pack}.nodes")]:
        sys.modules.pop(name)
    return found


def test_nodes_are_what_shared_graphs_know(schemas: list[Any]) -> None:
    """Graphs keep an input's value by its place: a new one goes to the end, and none goes away."""
    assert summary(schemas) == KNOWN


def test_every_input_says_what_to_choose(schemas: list[Any]) -> None:
    for schema in schemas:
        assert [given.id for given in schema.inputs if not given.tooltip] == [], schema.node_id
        assert schema.category == "Hollow"
        assert schema.description


def test_every_node_has_a_help_page_with_a_picture(schemas: list[Any]) -> None:
    docs = ROOT / "nodes" / "web" / "docs"
    for schema in schemas:
        page = (docs / f"{schema.node_id}.md").read_text()
        assert page.startswith(f"# {schema.display_name}\n")
        assert (docs / f"{schema.node_id}.jpg").exists()
        assert f"![{schema.display_name}]({schema.node_id}.jpg)" in page  # the front end finds it beside the page


def test_what_comfyui_users_install_is_what_pyproject_asks_for() -> None:
    asked = re.findall(r'^    "([\w-]+>=[\d.]+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    installed = [line for line in lines if not line.startswith("#")]
    assert len(installed) == 4
    assert set(installed) < set(asked)
