"""A training step beside other trainers': `python -m benchmarks.peers --comfyui DIR --diffusers-scripts DIR`.

ComfyUI's own Train LoRA, diffusers' DreamBooth script and Hollow, as nodes and as a command, train on the same random
weights of a true shape: same picture, rank, precision and number of steps, batch 1, AdamW, no gradient checkpointing.
Each runs twice in a process of its own, for a few steps and for more. The difference is the steps', so that loading
and precomputing do not count. On a CPU seconds are those of the CPU, user and system, on one thread, and the peak is
the process's resident memory until the LoRA is there, often that of loading: weights in fp32 beside the file in fp16
that they come from. On a GPU, which should be idle, seconds are the clock's, so that it takes hundreds of steps, and
the peak is what nvidia-smi says beyond what was taken before.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hollow_core import __version__
from hollow_core.errors import HollowError
from hollow_core.files import read_json, write_json
from hollow_core.memory.planner import GIB

from .comfyui import built_in, hollowed, in_comfyui
from .commands import SCRIPTS, hollow, script
from .cost import GPU, Cost, per_step
from .prepare import prepare

PEERS: dict[str, Callable[[argparse.Namespace, int, Path], Cost]] = {
    "ComfyUI's Train LoRA": partial(in_comfyui, built_in),
    "diffusers' script": script,
    "Hollow's nodes, all layers, k=3": partial(in_comfyui, partial(hollowed, "all layers")),
    "Hollow's nodes, k=3": partial(in_comfyui, partial(hollowed, "attention")),
    "hollow train, plain": partial(hollow, -1),
    "hollow train, k=3": partial(hollow, 3),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout of ComfyUI")
    parser.add_argument("--diffusers-scripts", type=Path, required=True, help="diffusers' folder examples/dreambooth")
    parser.add_argument("--python", default=sys.executable, help="that runs both of them (default this one)")
    parser.add_argument("--layout", choices=SCRIPTS, default="sd15")
    parser.add_argument("--resolution", type=int, default=256, help="side of the picture in pixels (default 256)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA (default 16)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, nargs=2, default=[3, 9], help="of the two runs (default 3 9)")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), metavar="ROW", help="which (all)")
    parser.add_argument("--out", type=Path, default=Path("hollow-peers"), help="folder; what is in it is not run again")
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("layout", "resolution", "rank", "precision", "steps")}
    path, made = options.out / "peers.json", settings | versions(options)
    found: dict[str, Any] = read_json(path) if path.exists() else {"made": made, "rows": {}}
    if found["made"] != made:
        raise SystemExit(f"{path} was made with {found['made']}, not {made}. Choose another --out.")
    prepare(options)
    rows = found["rows"]
    for name in options.only:
        if "step" not in rows.get(name, {}):
            rows[name] = row(partial(PEERS[name], options), options.steps)
            write_json(path, found)
    print(", ".join(f"{what} {how}" for what, how in made.items()))
    print(table({name: rows[name] for name in PEERS if name in rows}))


def row(run: Callable[[int, Path], Cost], steps: Sequence[int]) -> dict[str, Any]:
    """Seconds a "step" and the "peak" in bytes, or "why" there are none, in a sentence."""
    try:
        costs = []
        for number in steps:
            with tempfile.TemporaryDirectory() as folder:
                costs.append(run(number, Path(folder)))
    except HollowError as error:
        return {"why": str(error)}
    return {"step": per_step(costs, steps), "peak": max(cost.peak for cost in costs)}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [f"| | a step, seconds{'' if GPU else ' of CPU'} | peak, GiB |", "|---|---|---|"]
    for name, found in rows.items():
        figures = f"{found['step']:.2f} | {found['peak'] / GIB:.2f}" if "step" in found else f"{found['why']} |"
        lines.append(f"| {name} | {figures} |")
    return "\n".join(lines)


def versions(options: argparse.Namespace) -> dict[str, str]:
    """Of what is compared; "none" for what is not there."""
    ask = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    found = {"Hollow": __version__}
    for package in ("torch", "diffusers"):
        asked = subprocess.run([options.python, "-c", ask, package], capture_output=True, text=True)
        found[package] = asked.stdout.strip() or "none"
    written = options.comfyui / "comfyui_version.py"
    number = re.search(r'__version__ = "(.+)"', written.read_text(encoding="utf-8")) if written.exists() else None
    return found | {"ComfyUI": number[1] if number else "none"}


if __name__ == "__main__":
    main()
