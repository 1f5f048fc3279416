"""The house: a room imports only from those below it, and its front door opens without waking anything."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

import hollow_core

ROOT = Path(__file__).parents[1]


def test_every_room_has_its_place_and_imports_only_from_those_below_it(capsys, monkeypatch):
    monkeypatch.setattr("importlinter.cli.logging_config.dictConfig", lambda _: None)  # it would silence other tests'
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_the_front_door_hands_on_what_it_names():
    for name in hollow_core.__all__:
        assert callable(getattr(hollow_core, name))
    assert hollow_core.personalize.__module__ == "hollow_core.road"
    with pytest.raises(AttributeError, match="no attribute 'hollow'"):
        hollow_core.hollow  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "hollow_core" / "__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        each.asname: f"{node.module}.{each.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for each in node.names
    }
    assert seen == hollow_core._BEHIND


def test_the_door_opens_without_torch():
    code = "import sys, hollow_core; dir(hollow_core); print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "diffusers", "peft", "numpy", "PIL", "safetensors"} & {*loaded.split()}
