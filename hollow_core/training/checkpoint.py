"""The state of a training run in one safetensors file: all that going on, as if never interrupted, needs."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import HollowError
from ..files import digest_all, fits, read_safetensors, write_safetensors
from .settings import LATER, TrainSettings

_KEY = "hollow.checkpoint"  # of the metadata; one key, as safetensors writes several in any order
LOSS_SCALE = 2.0**16
"""By which a loss in fp16 is multiplied at first; it only falls."""
_LATER = ("validation", "digest")  # of what it says, which older checkpoints do not have


class Checkpoint(NamedTuple):
    """A training run after so many steps as it has losses."""

    lora: dict[str, Tensor]  # as `lora_state` gives it
    optimizers: dict[str, dict[str, dict[str, Tensor]]]  # of each way to step, as `Optimizer.state` gives it
    averages: dict[str, Tensor]  # as `Averages.state` gives them
    losses: list[float]
    loss_scale: float
    made_for: Mapping[str, Any]  # what a run must have in common with this one to go on from it
    validation: list[tuple[int, float]] = []  # noqa: RUF012  # after how many steps the held-out loss was what

    def save(self, path: Path) -> None:
        """Write it to `path`; an older file there is replaced whole. Raises HollowError where it cannot."""
        tensors = {f"lora {name}": tensor for name, tensor in self.lora.items()}
        for way, state in self.optimizers.items():
            for index, parts in state.items():
                tensors |= {f"optimizer {way} {index} {part}": tensor for part, tensor in parts.items()}
        tensors |= {f"average {name}": tensor for name, tensor in self.averages.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        about = {"loss_scale": self.loss_scale, "made_for": self.made_for, "validation": self.validation}
        about["digest"] = digest_all(tensors.items())
        write_safetensors(path, tensors, {_KEY: json.dumps(about)})

    @classmethod
    def load(cls, path: Path, made_for: Mapping[str, Any] | None = None) -> "Checkpoint":
        """The checkpoint at `path`, whatever it was made for if `made_for` is None.

        Raises HollowError for a file that is damaged or was edited, and for one made for something else, saying what.
        """
        tensors, metadata = read_safetensors(path)
        if _KEY not in metadata:
            raise HollowError(f"{path} is no checkpoint of a training. Choose another folder.")
        about = _read_about(path, metadata[_KEY])
        stored = about["made_for"]
        asked = stored if made_for is None else json.loads(json.dumps(made_for))
        if stored != asked:
            raise HollowError(
                f"{path} is of a training that differs: {', '.join(_differences(stored, asked))}. "
                "Go back to what it was, choose another folder, or delete the file to start anew."
            )
        if about.get("digest", found := digest_all(tensors.items())) != found:
            raise damaged_checkpoint(path, "it does not hold what was written")
        lora, averages = {}, {}
        optimizers = defaultdict[str, dict[str, dict[str, Tensor]]](dict)
        for name, tensor in tensors.items():
            match name.split(" "):
                case ["lora", key]:
                    lora[key] = tensor
                case ["optimizer", way, index, part]:
                    optimizers[way].setdefault(index, {})[part] = tensor
                case ["average", key]:
                    averages[key] = tensor
        losses = tensors.get("losses")
        if losses is None or losses.dim() != 1 or not losses.is_floating_point():
            raise damaged_checkpoint(path, "it has no losses of its steps")
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise damaged_checkpoint(path, f"{name} is not finite, as after a learning rate that is too high")
        validation = [(step, loss) for step, loss in about.get("validation", [])]
        return cls(lora, optimizers, averages, losses.tolist(), about["loss_scale"], stored, validation)


def damaged_checkpoint(path: Path, why: str) -> HollowError:
    """What is said of one from which no training can go on."""
    return HollowError(f"{path} cannot be gone on from: {why}. Delete it to start the training anew.")


def _read_about(path: Path, text: str) -> dict[str, Any]:
    """What a checkpoint says beside its tensors. Raises HollowError for what `save` does not write."""
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged_checkpoint(path, f"its metadata are not valid JSON ({error})") from error
    kinds = {"loss_scale": float, "made_for": dict[str, Any], "validation": list[tuple[int, float]], "digest": str}
    for name, kind in kinds.items():
        if not isinstance(about, dict) or not (fits(about.get(name), kind) or (name in _LATER and name not in about)):
            raise damaged_checkpoint(path, f"its metadata have no {name} that a training writes")
    if not 0 < about["loss_scale"] <= LOSS_SCALE:
        raise damaged_checkpoint(path, f"its loss_scale is {about['loss_scale']}")
    checked: dict[str, Any] = about
    return checked


def _differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """In words. What counts on one side alone, as the steps do for a learning rate that falls, comes with another
    difference, and is left out for it."""
    usual = {each.name: each.default for each in fields(TrainSettings) if each.name in LATER}
    there, here = usual | dict(stored), usual | dict(asked)
    both = [
        f"{name} ({there[name]} there, {here[name]} asked)"
        for name in here
        if name in there and there[name] != here[name]
    ]
    return both or sorted(there.keys() ^ here.keys())
