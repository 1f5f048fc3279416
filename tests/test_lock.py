"""One process at a time in a folder: who holds it is told, and a killed one holds nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest

from hollow_core.errors import HollowError
from hollow_core.lock import LOCK, holding

HOLD = """
import sys
from pathlib import Path
from hollow_core.lock import holding
with holding(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def another(folder: Path) -> subprocess.Popen[str]:
    """A process that holds `folder`, until its input ends."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_is_one_processs_and_says_whose(tmp_path: Path) -> None:
    """By whatever path it is called. When the process ends, it is free; when it is killed, too."""
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for kill in (False, True):
        with another(tmp_path / "run") as process:
            for path in (tmp_path / "run", tmp_path / "link", tmp_path / "x" / ".." / "run"):
                with (
                    pytest.raises(HollowError, match=rf"(run|link) is in use by process {process.pid} on \S+ since 20"),
                    holding(path),
                ):
                    raise AssertionError
            with holding(tmp_path / "another"):
                pass
            if kill:
                os.kill(process.pid, signal.SIGKILL)
        assert (tmp_path / "run" / LOCK).exists() == kill
        with holding(tmp_path / "run"):
            assert str(os.getpid()) in (tmp_path / "run" / LOCK).read_text()


def test_nothing_is_left_behind_but_what_was_written(tmp_path: Path) -> None:
    with holding(tmp_path / "new" / "run"), holding(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with holding(tmp_path / "new" / "run"):
        (tmp_path / "new" / "lora").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "lora"]


def test_another_thread_is_another(tmp_path: Path) -> None:
    said: list[str] = []

    def enter() -> None:
        try:
            with holding(tmp_path):
                pass
        except HollowError as error:
            said.append(str(error))

    with holding(tmp_path):
        thread = Thread(target=enter)
        thread.start()
        thread.join()
        with holding(tmp_path):  # whoever holds it enters again
            pass
        assert (tmp_path / LOCK).exists()
    assert f"by process {os.getpid()}" in said[0]


def test_many_that_come_and_go_are_never_two(tmp_path: Path) -> None:
    """The lock's file goes with each: none may lock one that is gone already."""
    program = """
import os, sys
from pathlib import Path
from hollow_core.errors import HollowError
from hollow_core.lock import holding
folder, inside, entered = Path(sys.argv[1]), Path(sys.argv[1]) / "inside", 0
while entered < 100:
    try:
        with holding(folder):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            inside.unlink()
            entered += 1
    except HollowError as error:
        assert "is in use" in str(error)
"""
    run = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in run] == [0, 0, 0]


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(HollowError, match=r"cannot be written in \(.*\)\. Free some space or"),
        holding(tmp_path / "file"),
    ):
        raise AssertionError
