"""Reading and writing the two formats that Hollow knows, safetensors and JSON, without half-written files."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import HollowError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def read_json(path: Path) -> Any:
    """The parsed content of `path`. Raises HollowError where it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HollowError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise HollowError(f"{path} is not valid JSON ({error}). Delete it and make it again.") from error


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


def damaged(path: Path, error: Exception) -> HollowError:
    """What is said of a safetensors file that does not open."""
    if not path.exists():
        return HollowError(f"{path} does not exist. Check the path.")
    return HollowError(f"{path} is not a whole safetensors file ({error}). Get or make it again.")


def _write_beside(path: Path, write: Callable[[Path], Any]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise HollowError(
            f"{path} could not be written ({error}). Free some space or choose another folder."
        ) from error
