"""One process at a time in a folder, by a lock that the kernel lets go of when its process dies."""

import errno
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path

from .errors import HollowError

LOCK = ".lock"
_AT = 2**30  # the byte that Windows locks, behind what the file says: others may read that
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """While inside, no other process and no other thread gets into `folder`, which is made; whoever holds it may enter
    again.

    Nothing is left behind: the lock's file goes, and so does a folder that was made for it and stayed empty. Where
    files cannot be locked, as on some network drives, nothing is. Raises HollowError where the folder is held, saying
    by whom, and where it cannot be written in.
    """
    whole = Path(os.path.realpath(folder))
    if whole in _held.get():
        yield
        return
    made = [each for each in (whole, *whole.parents) if not each.exists()]
    try:
        whole.mkdir(parents=True, exist_ok=True)
        file = _locked(whole / LOCK)
    except OSError as error:
        raise HollowError(
            f"{folder} cannot be written in ({error.strerror}). Free some space or choose another folder."
        ) from error
    if file is None:
        raise HollowError(
            f"{folder} is in use{_by_whom(whole / LOCK)}. Wait until that has ended, or choose another folder."
        )
    token = _held.set(_held.get() | {whole})
    try:
        yield
    finally:
        _held.reset(token)
        _unlock(file, whole / LOCK)
        with suppress(OSError):  # of one that is not empty
            for each in made:
                each.rmdir()


def _locked(path: Path) -> int | None:
    """The open lock's file, which says who holds it; None where another has it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(file):
                os.close(file)
                return None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    _tell(file)
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # that of one who has just ended and removed it


def _tell(file: int) -> None:
    """Write down who holds it, if the disk has room for that."""
    since = datetime.now().strftime("%Y-%m-%d %H:%M")
    who = {"process": os.getpid(), "computer": platform.node(), "since": since}
    with suppress(OSError):
        os.ftruncate(file, 0)
        os.write(file, json.dumps(who).encode())


def _lock(file: int) -> bool:
    """Whether it is free, and ours from now on."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(file, _AT, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
            os.lseek(file, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK)
    return True


def _unlock(file: int, path: Path) -> None:
    """Windows removes no open file, and others must not get hold of one that is about to go."""
    if os.name == "nt":
        os.close(file)
    with suppress(OSError):
        path.unlink(missing_ok=True)
    if os.name != "nt":
        os.close(file)


def _by_whom(path: Path) -> str:
    """ " by process 12 on rex since 2026-11-29 10:15", as far as it is told."""
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        return f" by process {who['process']} on {who['computer']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return " by another process"
