"""ComfyUI's folders; a name from a graph never leaves them."""

from pathlib import Path

import folder_paths

from ...hollow_core.errors import HollowError


def store_folder(name: str) -> Path:
    """Where the records of a store are kept: output/hollow/NAME."""
    return inside(Path(folder_paths.get_output_directory()) / "hollow", name)


def lora_path(name: str) -> Path:
    """Where a LoRA named in the graph is saved: NAME.safetensors in the first of ComfyUI's loras folders."""
    return inside(Path(folder_paths.get_folder_paths("loras")[0]), name.removesuffix(".safetensors") + ".safetensors")


def known_loras() -> list[str]:
    """The LoRA files that ComfyUI lists."""
    return [str(name) for name in folder_paths.get_filename_list("loras")]


def known_lora(name: str) -> Path:
    """The file of one of `known_loras`."""
    return Path(folder_paths.get_full_path_or_raise("loras", name))


def inside(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`. Raises HollowError for an empty name and for one that leads out of it."""
    path = (folder / name).resolve()
    if not name.strip() or folder.resolve() not in path.parents:
        raise HollowError(
            f"The name {name!r} does not stay inside {folder}. Choose a name without .. and without a drive."
        )
    return path
