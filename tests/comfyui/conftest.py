"""Lets tests use a real ComfyUI: the checkout that COMFYUI_DIR names, on the CPU, and the pack as ComfyUI loads it.

With COMFYUI_DYNAMIC_VRAM set, too, under the flag that newer versions set on NVIDIA (`dynamic_vram`).
Test modules begin with `pytest.importorskip("comfy", reason=…)`: without COMFYUI_DIR they are skipped.
"""

import importlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfyui_server import Server

ROOT = Path(__file__).parents[2]
DYNAMIC_VRAM = "COMFYUI_DYNAMIC_VRAM" in os.environ


def _load_comfyui(checkout: str) -> None:
    sys.path.insert(0, checkout)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    # As main.py does, utils comes first: ComfyUI's nodes put another module of that name in its way.
    for name in ("utils.extra_config", "nodes", "server"):
        importlib.import_module(name)
    if DYNAMIC_VRAM:
        importlib.import_module("dynamic_vram")


def _load_pack() -> None:
    """As package `hollow_pack`: ComfyUI, too, loads the folder under a name of its own."""
    spec = importlib.util.spec_from_file_location("hollow_pack", ROOT / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hollow_pack"] = module
    spec.loader.exec_module(module)


if "COMFYUI_DIR" in os.environ:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _load_comfyui(os.environ["COMFYUI_DIR"])
        _load_pack()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings of ComfyUI are not ours to mend."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A ComfyUI of its own, on the CPU and with empty folders, that has this pack among its custom nodes."""
    folder = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "input", "models", "user"):
        (folder / name).mkdir()
    packs = {"hollow": ROOT}
    if DYNAMIC_VRAM:
        packs["dynamic_vram"] = Path(__file__).parent / "dynamic_vram"
    for name, pack in packs.items():
        (folder / "custom_nodes" / name).symlink_to(pack, target_is_directory=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    command = [sys.executable, "main.py", "--cpu", "--port", str(port), "--base-directory", str(folder)]
    with log.open("w") as written:
        process = subprocess.Popen(
            [*command, "--database-url", "sqlite://"],
            cwd=os.environ["COMFYUI_DIR"],
            stdout=written,
            stderr=subprocess.STDOUT,
        )
    running = Server(f"http://127.0.0.1:{port}", log, folder)
    try:
        while "To see the GUI" not in log.read_text():
            assert process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.2)
        yield running
    finally:
        process.terminate()
        process.wait()
