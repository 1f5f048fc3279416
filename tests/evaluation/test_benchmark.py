"""The benchmark from a data set's folder to the table, on the embedded model with tiny scorers."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import pytest
from tiny_datasets import write_dreambooth
from tiny_scorers import save_tiny_scorers
from tiny_training import content

from hollow_core.cli import main
from hollow_core.demo.run import MODEL, model
from hollow_core.errors import HollowError
from hollow_core.evaluation.benchmark import Job, Method, Protocol, make_jobs, run_job, share, table
from hollow_core.evaluation.datasets import Subject, load_subjects
from hollow_core.evaluation.scores import load
from hollow_core.files import write_json
from hollow_core.sampling.sample import SampleSettings
from hollow_core.training.settings import TrainSettings

PROTOCOL = Protocol(
    images=2,
    samples=4,
    class_images=2,
    training=TrainSettings(steps=2),
    sampling=SampleSettings(steps=1),
)


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_tiny_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dreambooth(tmp_path_factory.mktemp("data"))


def stopping_after(asked: int) -> Iterator[bool]:
    yield from [False] * asked
    while True:
        yield True


@pytest.mark.slow
def test_a_stopped_job_goes_on_to_the_same_end(
    scorers: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hollow_core.sampling.sample.AT_A_TIME", 3)
    judge = load(*map(str, scorers))
    (subject,) = load_subjects("dreambooth", data, ["my_cup"])

    def job(out: str) -> Job:
        return Job(Method.parse("hollowed-k3-r2"), 0, subject, tmp_path / out)

    assert run_job(job("whole"), model, judge, PROTOCOL)
    stops = 0
    for asked in (1, 3, 4, 1, 99):  # in class pictures, in precomputing, in training, in drawing, never
        stop = stopping_after(asked)
        finished = run_job(job("stopped"), model, judge, PROTOCOL, stop=lambda stop=stop: next(stop))
        stops += not finished
        assert finished == job("stopped").result.exists()
    assert stops == 4
    stopped, whole = (content(tmp_path / out) for out in ("stopped", "whole"))
    assert stopped.keys() == whole.keys()
    for name in whole:
        if not name.endswith(".safetensors"):  # their metadata have no order; the pictures are drawn with them
            assert stopped[name] == whole[name], name
    assert {path.name for path in job("whole").folder.iterdir()} == {"lora.safetensors", "pictures", "scores.json"}


@pytest.mark.slow
def test_the_command_ends_with_a_table(
    scorers: tuple[Path, Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def benchmark(*more: object) -> tuple[object, str, str]:
        given = ["benchmark", "dreambooth", "--data", data, "--model", MODEL, "--out", tmp_path / "out"]
        given += ["--dino", scorers[0], "--clip", scorers[1], "--device", "cpu", "--subject", "my_cat"]
        given += ["--seeds", 1, "--images", 1, "--steps", 2, "--samples", 4, "--class-images", 0]
        given += ["--sampling-steps", 1, *more]
        monkeypatch.setattr(sys, "argv", ["hollow", *map(str, given)])
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code or 0, *capsys.readouterr())

    methods = ("--method", "lora-r2", "--method", "hollowed-k3-r2")
    status, out, err = benchmark(*methods, "--json")
    assert status == 0, err
    lora, hollowed = json.loads(out)
    assert (lora["method"], lora["jobs_done"], lora["jobs"]) == ("lora-r2", 1, 1)
    assert hollowed["training_bytes"] < lora["training_bytes"]
    told = json.loads((tmp_path / "out" / "lora-r2" / "seed-0" / "my_cat" / "scores.json").read_text())
    assert lora["dino"] == [mean(picture["dino"] for picture in told["pictures"]), None]
    first, _ = told["pictures"]
    assert first["prompt"] == "a sks cat at night"

    before = content(tmp_path / "out")
    status, out, err = benchmark(*methods)
    assert status == 0, err
    assert "hollowed-k3-r2" in out
    assert "1/1" in out
    assert content(tmp_path / "out") == before

    status, out, err = benchmark(*methods, "--steps", 3)
    assert (status, out) == (1, "")
    assert "was begun with training.steps 2, not 3" in " ".join(err.split())
    status, out, err = benchmark("--method", "lora")
    assert "There is no method 'lora'. Write lora-r128" in " ".join(err.split())


def test_the_table_is_the_mean_of_seeds_with_their_deviation(tmp_path: Path) -> None:
    subjects = [Subject(name, "cat", tmp_path, ("a {}",)) for name in ("one", "two")]
    jobs = make_jobs(tmp_path, [Method.parse("lora-r1")], [0, 1], subjects)
    for job, dino in zip(jobs, (0.1, 0.2, 0.5), strict=False):  # of one: seeds 0 and 1, of two: seed 0
        write_json(job.result, {"mean": {"dino": dino, "clip_i": 0.5, "clip_t": 0.3}})
    (row,) = table(jobs)
    assert (row.done, row.jobs) == (3, 4)
    assert row.scores["dino"] == pytest.approx((mean([0.3, 0.2]), stdev([0.3, 0.2])))
    assert row.scores["clip_t"] == pytest.approx((0.3, 0))


def test_processes_share_the_jobs_by_class(tmp_path: Path) -> None:
    classes = ["dog", "cat", "cup", "dog", "cat", "vase", "dog"]
    subjects = [Subject(str(number), word, tmp_path, ()) for number, word in enumerate(classes)]
    jobs = make_jobs(tmp_path, [Method.parse("lora-r1"), Method.parse("hollowed-k0-r4")], [0], subjects)
    shares = [share(jobs, process, 3) for process in range(3)]
    assert sorted(job.folder for each in shares for job in each) == sorted(job.folder for job in jobs)
    words = [{job.subject.class_word for job in each} for each in shares]
    assert words == [{"dog", "vase"}, {"cat"}, {"cup"}]


@pytest.mark.parametrize("name", ["lora", "lora-r0", "hollowed-r4", "hollowed-k3", "full"])
def test_methods_have_their_names(name: str) -> None:
    with pytest.raises(HollowError, match=f"There is no method '{name}'"):
        Method.parse(name)
    assert Method.parse("lora-r16")[1:] == (None, 16)
    assert Method.parse("hollowed-k10-r4")[1:] == (10, 4)
