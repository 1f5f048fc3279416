"""Where a training is: the first in a folder has the folder itself, each other one a folder of its own in it.

    lora.safetensors, checkpoint.safetensors …   of the first
    training.json                                what the first is of: its store, and every setting that it goes by
    rank-4-1f0c2a9e/                             the same of another, named by what sets it apart from the first
    store/                                       the records of the first, and of all that go by them, too
    store-5d41402abc4b/                          other records

So nothing that was made is written over by a training with other settings, and the name of a file stays true.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import HollowError
from ..files import read_json, write_json
from .checkpoint import Checkpoint
from .settings import LATER, TrainSettings
from .store import Store
from .train import CHECKPOINT

STORE = "store"
TRAINING = "training.json"
_USUAL = {each.name: each.default for each in fields(TrainSettings) if each.name in LATER}
_CONTENT = {
    "model": "model",
    "schedule": "schedule",
    "kinds": "pictures",
    "prompts": "captions",
    "embeddings": "captions",
    "latents": "pictures",
    "repeats": "repeats",
    "masks": "masks",
}
"""What a store was made from, in a word: of what differs, the first is the reason for the others."""


def place(folder: Path, store: Store, settings: TrainSettings, name: str) -> Path:
    """Where in `folder` the LoRA `name` is trained on `store`, with what the training is of written down there.

    The same for the same store and settings, as far as these may not change when a training goes on; for fewer steps
    than were done there, another. Raises HollowError where a file that tells is damaged, or cannot be written.
    """
    made_for = {"store": store.id} | settings.fixed
    at = _place(folder, store, made_for, name)
    if _steps(at) > settings.steps:
        made_for |= {"steps": settings.steps}
        at = _place(folder, store, made_for, name)
    if not (at / TRAINING).exists():
        write_json(at / TRAINING, made_for)
    return at


def _place(folder: Path, store: Store, made_for: Mapping[str, Any], name: str) -> Path:
    made_for = json.loads(json.dumps(made_for))
    digest = hashlib.sha256(json.dumps(made_for, sort_keys=True).encode()).hexdigest()[:8]
    if (own := next(folder.glob(f"*-{digest}"), None)) is not None:
        return own
    first = _told(folder)
    free = first is None and not (folder / f"{name}.safetensors").exists() and store.folder == folder / STORE
    return folder if free or first == made_for else folder / f"{_apart(folder, first, made_for, store)}-{digest}"


def _told(folder: Path) -> dict[str, Any] | None:
    """What the training in a folder is of; None where there is none. Older ones have it in their checkpoint alone."""
    path = folder / TRAINING
    if path.exists():
        told = read_json(path)
        if not isinstance(told, dict):
            raise HollowError(f"{path} does not say what the training beside it is of. Delete it.")
        return told
    path = folder / CHECKPOINT
    return dict(Checkpoint.load(path).made_for) if path.exists() else None


def _steps(folder: Path) -> int:
    """How many are done there; none, as far as this goes, where the checkpoint is damaged: training says so."""
    with suppress(OSError, SafetensorError), safe_open(folder / CHECKPOINT, "pt") as file:
        return int(file.get_slice("losses").get_shape()[0])
    return 0


def _apart(folder: Path, first: Mapping[str, Any] | None, made_for: Mapping[str, Any], store: Store) -> str:
    """What sets a training apart from the first in `folder`, as a folder is named: "rank-4-seed-1"."""
    there, here = (_USUAL | dict(each) for each in (first or made_for, made_for))
    other = [key for key in here if key != "store" and there.get(key) != here[key]]
    other = [key for key in other if key in there] or other  # what another strategy has comes with the strategy
    differing = [f"{key}-{_plain(here[key])}" for key in other]
    with suppress(HollowError):  # of a damaged one: then it is not compared
        theirs, ours = (asdict(each.fingerprint) for each in (Store.open(folder / STORE), store))
        settings = [key for key in ("cut", "samples", "dtype") if theirs[key] != ours[key]]
        differing = [*(f"{key}-{_plain(ours[key])}" for key in settings), *differing]
        differing = differing or [word for key, word in _CONTENT.items() if theirs[key] != ours[key]][:1]
    return "-".join(differing)[:60].strip("-.") or "other"


def _plain(value: Any) -> str:
    """Without what the name of a file cannot have."""
    values = value if isinstance(value, list | tuple) else [value]
    words = "-".join(str(each).lower() for each in values)
    return re.sub(r"[^a-z0-9._-]+", "_", words)
