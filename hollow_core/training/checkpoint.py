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
from ..files import read_safetensors, write_safetensors
from .settings import LATER, TrainSettings

_KEY = "hollow.checkpoint"  # of the metadata; one key, as safetensors writes several in any order


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
        write_safetensors(path, tensors, {_KEY: json.dumps(about)})

    @classmethod
    def load(cls, path: Path, made_for: Mapping[str, Any] | None = None) -> "Checkpoint":
        """The checkpoint at `path`, whatever it was made for if `made_for` is None.

        Raises HollowError for a damaged file, and for one made for something else, saying what.
        """
        tensors, metadata = read_safetensors(path)
        if _KEY not in metadata:
            raise HollowError(f"{path} is no checkpoint of a training. Choose another folder.")
        about = json.loads(metadata[_KEY])
        stored = about["made_for"]
        asked = stored if made_for is None else json.loads(json.dumps(made_for))
        if stored != asked:
            raise HollowError(
                f"{path} is of a training that differs: {', '.join(_differences(stored, asked))}. "
                "Go back to what it was, choose another folder, or delete the file to start anew."
            )
        lora, averages = {}, {}
        optimizers = defaultdict[str, dict[str, dict[str, Tensor]]](dict)
        for name, tensor in tensors.items():
            match name.split(" "):
                case ["lora", key]:
                    lora[key] = tensor
                case ["optimizer", way, index, part]:
                    optimizers[way].setdefault(index, {})[part] = tensor
                case ["average", name]:
                    averages[name] = tensor
        validation = [(step, loss) for step, loss in about.get("validation", [])]
        losses = tensors["losses"].tolist()
        return cls(lora, optimizers, averages, losses, about["loss_scale"], stored, validation)


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
