"""What a process takes, whosever it is: seconds and memory."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from hollow_core.errors import HollowError

GPU = torch.cuda.is_available()
POLL = 0.1  # seconds


@dataclass(frozen=True)
class Cost:
    """What a run took until its LoRA was there."""

    seconds: float
    peak: int
    """Bytes."""


def per_step(costs: Sequence[Cost], steps: Sequence[int]) -> float:
    """Seconds of one step, by a run of few and one of more."""
    short, long = costs
    return (long.seconds - short.seconds) / (steps[1] - steps[0])


def run(command: list[Any], cwd: Path, log: Path, done: Callable[[], bool]) -> Cost:
    """Of a command that is ended as soon as it is done. Raises HollowError, with its last words, where it never is."""
    before = gpu_bytes()
    with process(command, cwd, log) as running:
        return watched(running, done, log, before)


@contextmanager
def process(command: list[Any], cwd: Path, log: Path) -> Iterator[psutil.Popen]:
    """One that writes to `log`, and has ended afterwards."""
    environment = os.environ | ({} if GPU else {"OMP_NUM_THREADS": "1"}) | {"HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as written:
        running = psutil.Popen(list(map(str, command)), cwd=cwd, env=environment, stdout=written, stderr=written)
    try:
        yield running
    finally:
        running.terminate()
        running.wait()


def watched(running: psutil.Popen, done: Callable[[], bool], log: Path, before: int) -> Cost:
    """What a process takes from now until it is done, and on a CPU from its start; `before` bytes of the GPU were taken
    by others."""
    begun, peak = time.monotonic(), 0
    while True:
        ended, finished = running.status() == psutil.STATUS_ZOMBIE, done()
        peak = max(peak, gpu_bytes() - before if GPU else resident_peak(running))
        if finished:
            break
        if ended:
            *_, last = [
                line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
            ] or ["nothing"]
            raise HollowError(f"It ended and said: {last.strip().rstrip('.')}.")
        time.sleep(POLL)
    seconds = time.monotonic() - begun if GPU else sum(running.cpu_times()[:4])  # children's, too
    return Cost(seconds, peak)


def resident_peak(running: psutil.Popen) -> int:
    """Bytes, the most so far; pages of the files that it has mapped are among them."""
    status = Path(f"/proc/{running.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


def gpu_bytes() -> int:
    """Taken on the first GPU, by whomever."""
    if not GPU:
        return 0
    ask = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(ask, check=True, capture_output=True, text=True).stdout) * 2**20
