"""The benchmark of a GPU, tried without one: on tiny models it goes all its ways, and peaks are none."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import ALL, OF_STEPS, measure_all, measurements
from benchmarks.gpu.demo import measure_repetition
from benchmarks.gpu.measurement import Figures, Found, Goal, Measurement, at_most, near_prediction, within
from benchmarks.gpu.models import Shape
from benchmarks.gpu.out_of_memory import BEFORE, STEPS, measure_out_of_memory
from hollow_core.demo import run, world
from hollow_core.files import write_json

CPU = torch.device("cpu")

TRIED = (
    "sd21 beside training k=3",
    "sd21 training plain",
    "sd21 training k=3",
    "sd21 precompute k=3, bf16, 8 together",
    "sdxl drawing on one path",
    "sdxl drawing on two paths, refresh 3",
)


@pytest.mark.slow
def test_each_kind_is_measured_once_and_what_fails_does_not_stop_the_rest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(device: torch.device) -> Figures:
        raise RuntimeError("CUDA error: an\nillegal | access")

    everything = {each.name: each for each in measurements(tmp_path, tiny=True)}
    todo = [Measurement("broken", fails), *(everything[name] for name in TRIED)]
    todo = [each if each.name == "sd21 training k=3" else replace(each, predict=None) for each in todo]
    found = Found(tmp_path / "results")
    measure_all(todo, found, CPU, "no GPU", time.monotonic() + 300)
    table = (found.folder / "TABLE.md").read_text()
    assert "broken: RuntimeError: CUDA error: an illegal / access" in table
    assert "def fails" not in table
    assert "raise RuntimeError" in found.trouble_path("broken").read_text()
    for name in TRIED:
        assert f"| {name} |" in table
    assert "| sd21 training k=3 | train, GiB | – | predicted 0.0" in table
    assert " of sd21 training plain, at most 0.80 |" in table
    assert " of sdxl drawing on one path, at most 1.10 |" in table
    assert table in capfd.readouterr().out

    again = [replace(each, measure=fails, predict=None) for each in todo if each.name in TRIED]
    measure_all(again, found, CPU, "no GPU", time.monotonic())
    unbroken = table.split("\n\n- broken")[0]
    assert (found.folder / "TABLE.md").read_text().strip() == unbroken.strip()


def test_nothing_new_begins_when_the_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure_all([Measurement("late", lambda device: {})], Found(tmp_path), CPU, "no GPU", time.monotonic() - 1)
    assert "| late | no time left |" in capsys.readouterr().out
    assert not Found(tmp_path).path("late").exists()


@pytest.mark.parametrize(
    ("goals", "figure", "expected"),
    [
        (near_prediction, "train, GiB", Goal("predicted 2.000: -6.0 %", False, "1.0 %")),
        (at_most("step, ms", 0.8, "plain"), "step, ms", Goal("0.75 of plain, at most 0.80", True, "-0.05")),
        (at_most("step, ms", 0.7, "plain"), "step, ms", Goal("0.75 of plain, at most 0.70", False, "0.05")),
        (at_most("step, ms", None, "plain"), "step, ms", Goal("0.75 of plain", None)),
        (within({"score": 0.5}, 0.03), "score", Goal("0.5 ± 0.03", False, "0.02")),
    ],
)
def test_a_goal_says_by_how_much_it_is_missed(
    tmp_path: Path, goals: Callable[..., dict[str, Goal]], figure: str, expected: Goal
) -> None:
    found = Found(tmp_path)
    write_json(found.path("k=3"), {"train, GiB": 1.88, "step, ms": 75.0, "score": 0.55})
    write_json(found.path("plain"), {"step, ms": 100.0})
    write_json(found.predicted_path("k=3"), {"train, GiB": 2.0})
    assert goals("k=3", found)[figure] == expected


def test_the_table_compares_only_what_is_measured(tmp_path: Path) -> None:
    names = [each.name for each in measurements(tmp_path, tiny=False)]
    assert len(set(names)) == len(names)
    paths = {Found(tmp_path).path(name) for name in names}
    assert len(paths) == len(names)
    for name, compared in OF_STEPS.items():
        assert name in ALL
        assert all(f"sd21 training {of}" in names for _, of in compared)


@pytest.mark.slow
def test_a_training_that_runs_out_of_memory_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    figures = measure_out_of_memory(Shape("sd21", tiny=True), CPU)
    assert figures["what was said"].startswith("Memory ran out in the stage train")
    assert figures["steps in the checkpoint"] == BEFORE
    assert figures["steps in the end"] == STEPS
    assert figures["a LoRA in the end"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_lora_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CLASS_IMAGES", 1)
    monkeypatch.setattr(run, "SAMPLES", 4)
    settings, work = replace(run.SETTINGS, steps=2), tmp_path / "work"
    run.write_references(tmp_path / "references", world.HELD_OUT[0])
    run.train(
        work / "hollowed", tmp_path / "references", world.HELD_OUT[0], run.CUT, settings, class_folder=work / "class"
    )
    figures = measure_repetition(tmp_path, settings, CPU)
    assert figures["largest difference"] == 0
    assert figures["largest number"] > 0
