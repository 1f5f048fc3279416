"""ComfyUI's folders; a name from a graph leaves them only by links that are there."""

import os
from fnmatch import fnmatch
from pathlib import Path

import folder_paths

from ...hollow_core.errors import HollowError


def store_folder(name: str) -> Path:
    """Where the records of a store are kept: output/hollow/NAME."""
    return inside(Path(folder_paths.get_output_directory()) / "hollow", name)


def lora_path(name: str) -> Path:
    """Where a LoRA named in the graph is saved: NAME.safetensors in the first of ComfyUI's loras folders."""
    return inside(Path(folder_paths.get_folder_paths("loras")[0]), name.removesuffix(".safetensors") + ".safetensors")


def listed_lora(path: Path) -> str:
    """What ComfyUI will call the LoRA at a `lora_path`: its name from the loras folder on."""
    return path.relative_to(os.path.abspath(folder_paths.get_folder_paths("loras")[0])).as_posix()


def known_loras() -> list[str]:
    """The LoRA files that ComfyUI lists."""
    return [str(name) for name in folder_paths.get_filename_list("loras")]


def known_lora(name: str) -> Path:
    """The file of one of `known_loras`."""
    return Path(folder_paths.get_full_path_or_raise("loras", name))


def matching_loras(names: str) -> list[Path]:
    """The files of `known_loras` that the lines of `names` stand for, with or without .safetensors and with * and ?.

    Raises HollowError for a line that matches none.
    """
    found: dict[str, Path] = {}
    for line in filter(None, map(str.strip, names.splitlines())):
        wanted = line.removesuffix(".safetensors") + ".safetensors"
        matching = [name for name in known_loras() if fnmatch(name.replace("\\", "/"), wanted)]
        if not matching:
            raise HollowError(f"The loras folder has no {line!r}. Check the name; a folder is written as folder/name.")
        found |= {name: known_lora(name) for name in matching}
    return list(found.values())


def inside(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`. Raises HollowError for an empty name and for one that leads out of it.

    Links inside the folder are followed, wherever they lead, as ComfyUI does: a graph cannot make one.
    """
    folder = Path(os.path.abspath(folder))
    path = Path(os.path.abspath(folder / name))
    if not name.strip() or folder not in path.parents:
        raise HollowError(
            f"The name {name!r} does not stay inside {folder}. Choose a name without .. and without a drive."
        )
    return path
