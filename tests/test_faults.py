"""Kills at random moments, full disks at each write, and files changed at random: a sentence, and nothing half-done."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_pipelines import shallow_pipeline
from tiny_training import full_disk

from benchmarks.faults import content, request
from hollow_core import files
from hollow_core.errors import HollowError
from hollow_core.models.base_model import load
from hollow_core.road import personalize


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    shallow_pipeline("sd15").save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_twenty_kills_a_hundred_changed_stores_and_five_hundred_loras_each_end_well(model: Path) -> None:
    """In a process of its own, which has ten minutes for what takes half of one, should anything hang."""
    asked = ["--runs", 4, "--kills", 5, "--mutations", 100, "--loras", 500]
    command = [sys.executable, "-m", "benchmarks.faults", "--model", str(model), *map(str, asked)]
    tree = Path(files.__file__).parents[1]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tree, timeout=600)
    assert ended.stdout, ended.stderr
    assert json.loads(ended.stdout) == {"killed": [], "stores and checkpoints": [], "LoRA files": []}
    assert ended.returncode == 0


@pytest.mark.slow
def test_a_full_disk_at_each_write_is_told_and_changes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file of a run is written twice: first the system refuses what goes beyond some bytes."""
    (tmp_path / "pictures").mkdir()
    for number, color in enumerate(("red", "green")):
        Image.new("RGB", (128, 128), color).save(tmp_path / "pictures" / f"{number}.png")
    really, refused = files._write_beside, []

    def write_twice(path: Path, write: Callable[[Path], Any]) -> None:
        before = held(tmp_path)
        with full_disk(60), pytest.raises(HollowError, match=r"could not be written .*too large") as told:
            really(path, write)
        assert str(path) in str(told.value)
        assert held(tmp_path) == before
        refused.append(path.name)
        really(path, write)

    personalize(lambda: load(model), request(tmp_path / "pictures"), tmp_path / "whole")
    monkeypatch.setattr(files, "_write_beside", write_twice)
    personalize(lambda: load(model), request(tmp_path / "pictures"), tmp_path / "run")
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    assert {*refused} == {path.name for path in (tmp_path / "whole").rglob("*") if path.is_file()}


def held(folder: Path) -> dict[Path, bytes]:
    """Every file, byte by byte."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_run_that_the_disk_ends_again_and_again_comes_to_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first write, then going on at the second of those left, and so on."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (128, 128), "red").save(tmp_path / "pictures" / "0.png")

    def run(name: str) -> None:
        personalize(lambda: load(model), request(tmp_path / "pictures"), tmp_path / name)

    run("whole")
    really, left = files._write_beside, 0

    def write_so_many(path: Path, write: Callable[[Path], Any]) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            return really(path, write)
        with full_disk(60):
            really(path, write)

    monkeypatch.setattr(files, "_write_beside", write_so_many)
    told = []
    for times in range(20):
        left = times
        try:
            run("run")
            break
        except HollowError as error:
            told.append(str(error))
    assert len(told) > 3
    assert all("Free some space or choose another folder." in each for each in told)
    assert content(tmp_path / "run") == content(tmp_path / "whole")
