"""Reading and writing the two formats that Hollow knows, safetensors and JSON, without half-written files."""

import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import HollowError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PLACE = ".hollow-"  # folders in which files are written, before they move to where they belong
_DAY = 24 * 60 * 60


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON; `path` appears whole or not at all. Raises HollowError if it cannot."""
    _write_beside(path, lambda part: part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8"))


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors contiguously, the same ones always as the same bytes; `path` appears whole or not at all. Raises
    HollowError if it cannot."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}

    def save(part: Path) -> None:
        part.touch()
        mode = part.stat().st_mode  # as the user's umask has it; safetensors lets the owner alone read
        save_file(contiguous, part, dict(metadata or {}))
        _sort_metadata(part)
        part.chmod(mode)

    _write_beside(path, save)


def _sort_metadata(path: Path) -> None:
    """By name, where safetensors leaves them in another order each time: the header takes as many bytes in any."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            told = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if len(told) <= length:
                file.seek(8)
                file.write(told.ljust(length))


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes; `path` appears whole or not at all. Raises HollowError if it cannot."""
    _write_beside(path, lambda part: part.write_bytes(data))


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture; `path` appears whole or not at all. Raises HollowError if it cannot."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    write_bytes(path, data.getvalue())


def write_figure(path: Path, figure: "Figure") -> None:
    """Write matplotlib's figure as PNG; `path` appears whole or not at all. Raises HollowError if it cannot."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write_bytes(path, data.getvalue())


def read_json(path: Path, advice: str = "Delete it and make it again.") -> Any:
    """The parsed content of `path`. Raises HollowError, with this advice, where it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HollowError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise HollowError(f"{path} is not valid JSON ({error}). {advice}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The parsed content of a file that others made and that is to be a JSON object. Raises HollowError where it is
    missing or anything else."""
    content = read_json(path, "Get it again.")
    if not isinstance(content, dict):
        raise HollowError(f"{path} is no JSON object but a {type(content).__name__}. Get it again.")
    return content


def fits(value: Any, kind: Any) -> bool:
    """Whether what was read from JSON is what a type says: any of bool, int, float, str, None, Any and Literal, and
    list, dict, tuple and `|` of these. A float may be written as an integer, and a tuple is a list there."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in inside
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inside)
    if origin is list:
        return isinstance(value, list) and all(fits(each, inside[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(each, inside[1]) for each in value.values())
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(inside) and all(map(fits, value, inside))
    if kind is float:
        return type(value) in (int, float)
    return kind is Any or type(value) is kind  # to isinstance a bool is an int


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of `path`. Raises HollowError where it is missing, truncated or damaged."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error


def digest(tensor: torch.Tensor) -> str:
    """A name for the content of a tensor: the same for the same dtype, shape and bytes, on any device."""
    data = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
    sha.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:32]


def digest_all(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A name for tensors by name, in any order."""
    return hashlib.sha256(repr(sorted((name, digest(tensor)) for name, tensor in tensors)).encode()).hexdigest()[:32]


def damaged(path: Path, error: Exception) -> HollowError:
    """What is said of a safetensors file that does not open: what is there instead, as far as its beginning tells."""
    if not os.path.exists(path):  # Path's own raises where its folder may not be entered
        return HollowError(f"{path} does not exist. Check the path.")
    if path.is_dir():
        return HollowError(f"{path} is a folder, not a safetensors file. Give a file in it.")
    try:
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError as unreadable:
        return HollowError(f"{path} cannot be read ({unreadable.strerror}).")
    what, advice = _instead(path, start) or (f" ({error})", "Get or make it again.")
    return HollowError(f"{path} is not a whole safetensors file{what}. {advice}")


def _instead(path: Path, start: bytes) -> tuple[str, str] | None:
    """What a file is that begins with these bytes, and what to do; None where they do not tell."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return ": it is empty", "Get or make it again."
    if start.startswith(b"version https://git-lfs"):
        return ": it is a git-lfs pointer to one", 'Run "git lfs pull" in its folder, or download the file itself.'
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return ": it is a web page", "Download the file itself, not the page about it; it may ask you to log in."
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return ": it is a pickle or zip (.ckpt, .pt, .bin)", "Those are never read: get the model as .safetensors."
    if start.startswith(b"GGUF"):
        return ": it is a GGUF file", "Get the model as .safetensors."
    if start.isascii() and start.decode("ascii").translate(dict.fromkeys(b"\t\r\n")).isprintable():
        first = " ".join(start.decode("ascii").split())[:80]
        return f": it is a text: {first!r}", "Download the file itself."
    return _cut_short(path, start)


def _cut_short(path: Path, start: bytes) -> tuple[str, str] | None:
    """The same for a download that broke off: the header tells how long the file would be."""
    length, size = int.from_bytes(start[:8], "little"), path.stat().st_size
    if length > _LONGEST_HEADER or start[8:9] != b"{":
        return None
    whole = 8 + length
    if size >= whole:
        with path.open("rb") as file, suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
            file.seek(8)
            header = json.loads(file.read(length))
            whole += max((it["data_offsets"][1] for name, it in header.items() if name != "__metadata__"), default=0)
    if size >= whole:
        return None
    return f": it ends after {size} bytes of at least {whole}", "Download or copy it again."


_LONGEST_HEADER = 100_000_000  # safetensors' own bound


def _write_beside(path: Path, write: Callable[[Path], Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _place_in(path.parent) as place:
            part = place / f"{path.name}.part"
            write(part)
            os.replace(part, path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error  # without the name of the part
        raise HollowError(f"{path} could not be written ({why}). Free some space or choose another folder.") from error


@contextmanager
def _place_in(folder: Path) -> Iterator[Path]:
    """A new folder in `folder`, so on the same disk, which is gone afterwards. It is this process' alone: others that
    write the same file have their own, and what a process leaves that is killed, safetensors' own files of a moment
    included, the next one sweeps that writes anything into `folder`."""
    with suppress(OSError):
        _sweep(folder)
    with ExitStack() as held:
        for last in (False, False, True):  # another process may take one for abandoned just as it is made
            place = Path(mkdtemp(prefix=_PLACE, dir=folder))
            if held.enter_context(_holding(place)) or last:
                break
            shutil.rmtree(place, ignore_errors=True)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Delete the places of processes that are no more; where nothing can be held, those older than a day."""
    for entry in [*os.scandir(folder)]:
        if entry.name.startswith(_PLACE) and entry.is_dir(follow_symlinks=False):
            with _holding(Path(entry)) as abandoned:
                if abandoned or time.time() - entry.stat().st_mtime > _DAY:
                    shutil.rmtree(entry, ignore_errors=True)


@contextmanager
def _holding(place: Path) -> Iterator[bool]:
    """Whether `place` is there and can be held as one's own, which it then is while inside, or until the process ends,
    however it does. False also where the system or the disk has no such locks."""
    try:
        handle = os.open(place, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = place.exists()
        except (OSError, AttributeError):
            held = False
        yield held
    finally:
        os.close(handle)
