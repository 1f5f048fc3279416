"""The benchmark beside other trainers: its arithmetic, its table, and what is said of a peer that does not run."""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.peers import __main__ as peers
from benchmarks.peers.__main__ import row, table
from benchmarks.peers.comfyui import built_in, default, in_comfyui
from benchmarks.peers.commands import script
from benchmarks.peers.cost import Cost, per_step
from benchmarks.peers.cost import run as run_command
from benchmarks.peers.prepare import clip_names


def test_loading_counts_for_no_step() -> None:
    assert per_step([Cost(31.0, 0), Cost(43.0, 0)], (3, 9)) == 2.0


def test_the_table_has_figures_or_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "GPU", False)
    rows = {"one": {"step": 2.0, "peak": 3 << 29}, "two": {"why": "It ended and said: no."}}
    assert table(rows).splitlines()[2:] == ["| one | 2.00 | 1.50 |", "| two | It ended and said: no. | |"]


def test_a_peer_that_is_not_there_is_a_row_that_says_so(tmp_path: Path) -> None:
    options = Namespace(layout="sd15", diffusers_scripts=tmp_path, comfyui=tmp_path)
    missing = "There is no train_dreambooth_lora.py in the folder of scripts."
    assert row(partial(script, options), (1, 2)) == {"why": missing}
    assert row(partial(in_comfyui, built_in, options), (1, 2)) == {"why": f"{tmp_path} is no checkout of ComfyUI."}


def test_a_command_costs_what_it_takes_until_it_is_done(tmp_path: Path) -> None:
    busy = "import pathlib, time; kept = bytearray(2**28); pathlib.Path('done').touch(); time.sleep(600)"
    cost = run_command([sys.executable, "-c", busy], tmp_path, tmp_path / "log", (tmp_path / "done").exists)
    if not peers.GPU:
        assert cost.peak > 2**28
        assert 0 < cost.seconds < 60


def test_a_command_that_ends_too_soon_is_told_by_its_last_words(tmp_path: Path) -> None:
    def run(steps: int, folder: Path) -> Cost:
        return run_command([sys.executable, "-c", "import no_such_package"], folder, folder / "log", lambda: False)

    assert row(run, (1, 2)) == {"why": "It ended and said: ModuleNotFoundError: No module named 'no_such_package'."}


def test_an_input_of_comfyui_has_its_default_or_first_choice() -> None:
    assert default(["INT", {"default": 16, "min": 1}]) == 16
    assert default([["AdamW", "SGD"]]) == "AdamW"
    assert default(["COMBO", {"options": ["bf16", "fp32"]}]) == "bf16"
    assert default(["MODEL"]) is None


def test_text_encoders_get_the_names_that_comfyui_reads() -> None:
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1))
    names = clip_names(encoder.state_dict()) | clip_names({"text_projection.weight": torch.zeros(0)})
    assert {"text_model.final_layer_norm.weight", "text_projection.weight"} <= names.keys()
