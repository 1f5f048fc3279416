"""A run's options in a TOML file: `--config` reads one, and every run leaves one beside its LoRA."""

import sys
from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import tomli_w
import typer

from ..errors import HollowError
from .levers import LEVERS, begun

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RUN_FILE = "run.toml"
NOT_KEPT = ("config", "as_json", "plan_only")
"""Options of a command, not of a run."""


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Let what `path` says stand for what is not on the command line. Raises HollowError as `read` does."""
    if path is not None:
        ctx.default_map = {**(ctx.default_map or {}), **read(ctx, path)}
    return path


def go_on(ctx: typer.Context, out: Path) -> Path:
    """Let the levers of the first run in `out` stand for those that are not named, as what is free is not the same every
    day, and what is tried beside it is to be compared."""
    path = out / RUN_FILE
    if path.exists() and begun(out):
        ctx.default_map = {**read(ctx, path, LEVERS), **(ctx.default_map or {})}
    return out


def read(ctx: typer.Context, path: Path, wanted: Collection[str] | None = None) -> dict[str, Any]:
    """What a file says of the `wanted` options, or of all: {their names in Python: values}.

    Raises HollowError where it cannot be read, for a key that is no option, and for a value that an option cannot have.
    """
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise HollowError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise HollowError(f"{path} is no valid TOML ({error}).") from error
    known = _keys(ctx)
    values = {}
    for key, value in content.items():
        if key not in known:
            raise HollowError(f"{path} has a key {key!r}, but there is no such option. See `hollow train --help`.")
        if wanted is None or known[key].name in wanted:
            _check(ctx, path, key, known[key], value)
            values[known[key].name] = value
    return values


def write(path: Path, ctx: typer.Context, levers: Mapping[str, Any], chosen: str | None) -> None:
    """Leave every option of this run, with the `levers` as they came to be, and what was `chosen` as a comment; where
    that is None, the one that is there stays. Options that are None are left out."""
    from ..files import write_bytes

    options = {**ctx.params, **levers}
    values = {key: options[param.name] for key, param in _keys(ctx).items()}
    text = tomli_w.dumps({key: _plain(value) for key, value in values.items() if value is not None})
    write_bytes(path, (_comment(path, chosen) + text).encode())


def _comment(path: Path, chosen: str | None) -> str:
    if chosen is not None:
        return f"# {chosen}\n"
    if not path.exists():
        return ""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return f"{first}\n" if first.startswith("#") else ""


def _keys(ctx: typer.Context) -> dict[str, Any]:
    """The parameters of the command by what a file calls them: as on the command line, without the dashes before."""
    return {param.opts[0].lstrip("-"): param for param in ctx.command.params if param.name not in (*NOT_KEPT, "help")}


def _check(ctx: typer.Context, path: Path, key: str, param: Any, value: Any) -> None:
    """Raises HollowError where the option cannot have this value."""
    flag = bool(getattr(param, "is_flag", False))
    try:
        if isinstance(value, bool) != flag:
            raise ValueError("Write true or false." if flag else "It is not true or false.")
        param.process_value(ctx, value)
    except (typer.BadParameter, TypeError, ValueError) as error:
        said = getattr(error, "message", None) or str(error)
        raise HollowError(f"{path}: {key} cannot be {value!r}. {said[:1].upper()}{said[1:]}") from error


def _plain(value: Any) -> Any:
    """As TOML has it."""
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
