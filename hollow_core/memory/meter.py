"""How long a stage takes, and how much memory."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch


@dataclass
class Stage:
    """One stage of a run, measured."""

    name: str
    seconds: float = 0.0
    peak_bytes: int = 0
    """The most memory held at once: of the GPU where there is one in use, else of this process."""


@dataclass
class Meter:
    """Collects the stages of a run; `with meter.stage("train"): …`."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stages: list[Stage] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Measure what runs inside; process memory is looked at twenty times a second."""
        stage = Stage(name)
        self.stages.append(stage)
        started, finished = time.monotonic(), threading.Event()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        watcher = threading.Thread(target=_watch, args=(stage, finished), daemon=True)
        watcher.start()
        try:
            yield stage
        finally:
            finished.set()
            watcher.join()
            stage.seconds = time.monotonic() - started
            if self.device.type == "cuda":
                stage.peak_bytes = torch.cuda.max_memory_allocated(self.device)


def free_bytes(device: torch.device) -> int:
    """What this process may have of a device's memory once it has let go of all its tensors there."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def used_bytes() -> int:
    """Resident memory of this process."""
    return psutil.Process().memory_info().rss


def _watch(stage: Stage, finished: threading.Event) -> None:
    while True:
        stage.peak_bytes = max(stage.peak_bytes, used_bytes())
        if finished.wait(0.05):
            return
