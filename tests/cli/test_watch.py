"""Progress where stderr is no terminal: a line as a stage begins and at each ten percent."""

import re

import pytest

from hollow_core.cli.watch import watching
from hollow_core.progress import Progress


def lines(told: pytest.CaptureFixture[str]) -> list[str]:
    return [re.sub(r", \d+\.\d\d GiB$", "", line) for line in told.readouterr().err.splitlines()]


def test_each_line_comes_when_it_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    with watching() as watch:
        watch("train", Progress(1, 200, 199.0, loss=0.5))
        assert lines(capsys) == ["train 1/200, loss 0.5000, 3:19 left"]
        for step in range(2, 200):
            watch("train", Progress(step, 200, 200.0 - step, loss=0.25, validation=0.125))
        assert lines(capsys) == [
            f"train {step}/200, loss 0.2500, validation 0.1250, {(200 - step) // 60}:{(200 - step) % 60:02} left"
            for step in range(20, 200, 20)
        ]
        watch("train", Progress(200, 200, 0.0, loss=0.25))
        assert lines(capsys) == ["train 200/200, loss 0.2500"]


def test_stages_short_or_begun_earlier_or_empty(capsys: pytest.CaptureFixture[str]) -> None:
    with watching() as watch:
        for step in (1, 2, 3):
            watch("precompute", Progress(step, 3, 0.0))
        for step in range(156, 171):  # a run that goes on
            watch("train", Progress(step, 200, 0.0))
        watch("precompute", Progress(1, 3, 0.0))  # of the next of several runs
        watch("jobs", Progress(0, 0, 0.0))
    assert lines(capsys) == [
        *("precompute 1/3", "precompute 2/3", "precompute 3/3"),
        *("train 156/200", "train 160/200"),
        *("precompute 1/3", "jobs 0/0"),
    ]
