"""Files appear whole or not at all, whoever else writes them, and what a killed process leaves is swept."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from tiny_training import content, full_disk

from hollow_core import files
from hollow_core.errors import HollowError
from hollow_core.files import (
    fits,
    read_json,
    read_safetensors,
    write_bytes,
    write_json,
    write_png,
    write_safetensors,
)

Write = Callable[[Path], None]

WRITE: dict[str, Write] = {
    "tensors": lambda path: write_safetensors(path, {"numbers": torch.arange(5000)}, {"of": "numbers"}),
    "json": lambda path: write_json(path, list(range(5000))),
    "bytes": lambda path: write_bytes(path, b"numbers" * 5000),
    "picture": lambda path: write_png(path, Image.effect_noise((99, 99), 50)),
}


@pytest.mark.parametrize("write", WRITE.values(), ids=WRITE)
@pytest.mark.parametrize("room", [0, 1000])
def test_on_a_full_disk_a_file_stays_what_it_was(tmp_path: Path, write: Write, room: int) -> None:
    for old in ({}, {"file": b"before"}):
        for name, data in old.items():
            (tmp_path / name).write_bytes(data)
        with full_disk(room), pytest.raises(HollowError, match=r"file could not be written \(.*too large.*\)\. Free"):
            write(tmp_path / "file")
        assert content(tmp_path) == old
        assert [path.name for path in tmp_path.iterdir()] == [*old]


@contextmanager
def nobody_special() -> Iterator[None]:
    """While inside, permissions bind, as they do not for root."""
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes are POSIX'")
@pytest.mark.parametrize("write", WRITE.values(), ids=WRITE)
def test_a_folder_that_cannot_be_written_is_told(write: Write) -> None:
    with tempfile.TemporaryDirectory() as made:  # pytest's folders cannot be entered by others
        folder = Path(made)
        (folder / "file").write_bytes(b"before")
        folder.chmod(0o555)
        with nobody_special():
            if os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
                pytest.skip("here even a read-only folder can be written")
            for path in (folder / "file", folder / "new", folder / "more" / "file"):
                with pytest.raises(HollowError, match=rf"{path} could not be written \(Permission denied\)\."):
                    write(path)
        folder.chmod(0o755)
        assert content(folder) == {"file": b"before"}


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes are POSIX'")
def test_a_file_that_cannot_be_read_is_told() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name in ("file", "closed/file"):
            write_json(folder / name, {})
            (folder / name).chmod(0)
        (folder / "closed").chmod(0)
        with nobody_special():
            if os.access(folder / "file", os.R_OK, effective_ids=os.access in os.supports_effective_ids):
                pytest.skip("here even a closed file can be read")
            for path in (folder / "file", folder / "closed" / "file"):
                for read in (read_json, read_safetensors):
                    with pytest.raises(HollowError, match=rf"^{path} .*\."):
                        read(path)


def test_those_who_write_one_file_at_once_do_not_meet(tmp_path: Path) -> None:
    """And whoever reads finds one of them, whole."""
    path, wrong = tmp_path / "file.safetensors", []

    def write(number: int) -> None:
        try:
            for _ in range(25):
                write_safetensors(path, {"number": torch.full((1000,), number)})
        except HollowError as error:
            wrong.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    write(7)
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert len(read_safetensors(path)[0]["number"].unique()) == 1
    assert wrong == []
    assert [each.name for each in tmp_path.iterdir()] == ["file.safetensors"]


AMID_WRITING = """
import os, signal, sys
from pathlib import Path
import safetensors.torch
from hollow_core import files

def write(part):
    files.save_file({}, part)
    (part.parent / ".tmpAbCdEf").write_bytes(b"as safetensors does")
    print("writing", flush=True)
    sys.stdin.readline()

files._write_beside(Path(sys.argv[1]), write)
"""


@pytest.mark.slow
def test_what_a_killed_process_leaves_is_swept_but_not_from_under_one_that_lives(tmp_path: Path) -> None:
    def begin(name: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", AMID_WRITING, str(tmp_path / name)]
        path = os.environ | {"PYTHONPATH": str(Path(files.__file__).parent.parent)}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=path)
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        return process

    with begin("killed") as killed, begin("alive") as alive:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert len(list(tmp_path.iterdir())) == 2
        write_json(tmp_path / "other.json", {})
        left = [path for path in tmp_path.iterdir() if path.name != "other.json"]
        assert [sorted(path.name for path in place.iterdir()) for place in left] == [[".tmpAbCdEf", "alive.part"]]
        alive.communicate(b"go on\n")
        assert alive.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"alive", "other.json"}


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 10**5, b"\xff\xfe", b"1" * 10**4])
def test_what_is_no_json_is_told(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file.json").write_bytes(data)
    if data == b"1" * 10**4 and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 reads long numbers")
    with pytest.raises(HollowError, match=r"file\.json is not valid JSON \(.*\)\. Delete it and make it again\."):
        read_json(tmp_path / "file.json")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, -3], [True, 0.0, "0", None]),
        (float, [0, 0.5], [False, "0", None]),
        (str, [""], [0, None, []]),
        (int | None, [None, 3], ["", 0.5]),
        (Literal["a", "b"], ["a"], ["c", [], {}, None]),
        (list[int], [[], [1]], [[1, "2"], {}, "12", None]),
        (dict[str, list[str]], [{}, {"a": ["b"]}], [{"a": "b"}, [], None]),
        (tuple[int, float], [[1, 2.5]], [[1], [1, 2, 3], [2.5, 1], "12"]),
        (Any, [None, 0, {}], []),
    ],
)
def test_what_is_read_is_held_against_a_type(kind: Any, good: list[Any], bad: list[Any]) -> None:
    assert all(fits(value, kind) for value in good)
    assert not any(fits(value, kind) for value in bad)
