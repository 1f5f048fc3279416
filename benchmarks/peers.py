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
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import psutil
import torch
from PIL import Image

from benchmarks.road import random_model
from hollow_core import __version__
from hollow_core.errors import HollowError
from hollow_core.files import read_json, write_json, write_safetensors
from hollow_core.memory.planner import GIB

ROOT = Path(__file__).parents[1]
PROMPT = "a photo of a sks dog"
RECORDS = 4  # that Hollow precomputes; a step's costs are those of any number
POLL = 0.1  # seconds
TEXT_ENCODER = "comfyui/text_encoder_{}.safetensors"
SCRIPTS = {"sd15": "train_dreambooth_lora.py", "sdxl": "train_dreambooth_lora_sdxl.py"}
GPU = torch.cuda.is_available()
ON_CPU = ["--cpu", "--use-pytorch-cross-attention"]  # of ComfyUI, which takes that by itself on a GPU only


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout of ComfyUI")
    parser.add_argument("--diffusers-scripts", type=Path, required=True, help="diffusers' folder examples/dreambooth")
    parser.add_argument("--python", default=sys.executable, help="that runs both of them (default this one)")
    parser.add_argument("--layout", choices=SCRIPTS, default="sd15")
    parser.add_argument("--resolution", type=int, default=256, help="side of the picture in pixels (default 256)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA (default 16)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, nargs=2, default=[3, 9], help="of the two runs (default 3 9)")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), help="which (default all)")
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
    number = re.search(r'__version__ = "(.+)"', written.read_text()) if written.exists() else None
    return found | {"ComfyUI": number[1] if number else "none"}


def prepare(options: argparse.Namespace) -> None:
    """The base model, a diffusers folder in fp16 as models are published, and the picture."""
    options.model, options.images = options.out / f"model-{options.layout}", options.out / "images"
    if not (options.model / "model_index.json").exists():  # the last of its files
        model = random_model(options.layout, torch.float16)
        for number, encoder in enumerate(model.text_encoders):
            write_safetensors(options.model / TEXT_ENCODER.format(number), clip_names(encoder.state_dict()))
        model.pipeline().save_pretrained(options.model)
    options.images.mkdir(exist_ok=True)
    Image.effect_noise((options.resolution,) * 2, 64).convert("RGB").save(options.images / "picture.png")


def clip_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As older transformers name a text encoder's weights, and ComfyUI expects them."""
    names = {key: key.removeprefix("text_model.") for key in state}
    return {name if "projection" in name else f"text_model.{name}": state[key] for key, name in names.items()}


# Runs.


def run(command: list[Any], cwd: Path, log: Path, done: Callable[[], bool]) -> Cost:
    """Of a command that is ended as soon as it is done. Raises HollowError, with its last words, where it never is."""
    before = gpu_bytes()
    with process(command, cwd, log) as running:
        return watched(running, done, log, before)


@contextmanager
def process(command: list[Any], cwd: Path, log: Path) -> Iterator[psutil.Popen]:
    """One that writes to `log`, and has ended afterwards."""
    environment = os.environ | ({} if GPU else {"OMP_NUM_THREADS": "1"}) | {"HF_HUB_OFFLINE": "1"}
    with log.open("w") as written:
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
            *_, last = [line for line in log.read_text().splitlines() if line.strip()] or ["nothing"]
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


def script(options: argparse.Namespace, steps: int, folder: Path) -> Cost:
    """diffusers' DreamBooth with LoRA on attention. At its end it loads the model once more, which does not count."""
    path = options.diffusers_scripts.resolve() / SCRIPTS[options.layout]
    if not path.exists():
        raise HollowError(f"There is no {path.name} in the folder of scripts.")
    given = {
        "pretrained_model_name_or_path": options.model.resolve(),
        "instance_data_dir": options.images.resolve(),
        "instance_prompt": PROMPT,
        "output_dir": folder,
        "resolution": options.resolution,
        "rank": options.rank,
        "train_batch_size": 1,
        "max_train_steps": steps,
        "learning_rate": 1e-4,
        "mixed_precision": "no" if options.precision == "fp32" else "bf16",
    }
    command = [options.python, path, *(word for name, value in given.items() for word in (f"--{name}", value))]
    if options.layout == "sd15":
        command.append("--pre_compute_text_embeddings")  # SDXL's script does so by itself
    return run(command, folder, folder / "log", (folder / "pytorch_lora_weights.safetensors").exists)


def hollow(cut: int, options: argparse.Namespace, steps: int, folder: Path) -> Cost:
    """`hollow train`."""
    given = {
        "images": options.images.resolve(),
        "subject": "dog",
        "out": folder,
        "cut": cut,
        "resolution": options.resolution,
        "samples": RECORDS,
        "rank": options.rank,
        "steps": steps,
        "precision": options.precision,
    }
    start = [sys.executable, "-c", "from hollow_core.cli import main; main()", "train", options.model.resolve()]
    command = [*start, *(word for name, value in given.items() for word in (f"--{name}", value))]
    return run(command, ROOT, folder / "log", (folder / "lora.safetensors").exists)


# In ComfyUI.

Graph = dict[str, dict[str, Any]]  # in API format: a node's id, its class_type and inputs


def in_comfyui(
    graph: Callable[[argparse.Namespace, int], Graph], options: argparse.Namespace, steps: int, folder: Path
) -> Cost:
    """A graph in a server of its own, from the start of it (on a GPU, of the graph) to the end of the graph."""
    if not (options.comfyui / "main.py").exists():
        raise HollowError(f"{options.comfyui} is no checkout of ComfyUI.")
    lay_out(options, folder)
    log = folder / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [options.python, "main.py", "--port", port, "--base-directory", folder, "--database-url", "sqlite://"]
    url = f"http://127.0.0.1:{port}"
    before = gpu_bytes()
    with process(command + ([] if GPU else ON_CPU), options.comfyui, log) as running:
        watched(running, lambda: "To see the GUI" in log.read_text(), log, before)
        asked = queue(url, graph(options, steps))

        def done() -> bool:
            history = get(url, f"history/{asked}")
            if asked in history and history[asked]["status"]["status_str"] != "success":
                said = dict(history[asked]["status"]["messages"])["execution_error"]
                raise HollowError(f"{said['node_type']} ended with: {said['exception_message'].strip()}")
            return asked in history

        return watched(running, done, log, before)


def lay_out(options: argparse.Namespace, folder: Path) -> None:
    """ComfyUI's folders, with the model's parts and this pack linked into them."""
    linked = {
        "custom_nodes/hollow": ROOT,
        "models/diffusion_models/unet.safetensors": options.model / "unet" / "diffusion_pytorch_model.safetensors",
        "models/vae/vae.safetensors": options.model / "vae" / "diffusion_pytorch_model.safetensors",
    }
    for number in range(2 if options.layout == "sdxl" else 1):
        linked[f"models/text_encoders/{number}.safetensors"] = options.model / TEXT_ENCODER.format(number)
    for name, target in linked.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target.resolve())
    shutil.copytree(options.images, folder / "input")  # where ComfyUI follows no link


def queue(url: str, graph: Graph) -> str:
    """The id under which ComfyUI runs it, with its own defaults for what is not said.

    Raises HollowError for a node that it has not, and for a graph that it refuses."""
    for node in graph.values():
        kind = node["class_type"]
        if kind not in (known := get(url, f"object_info/{kind}")):
            raise HollowError(f"This ComfyUI has no node {kind}.")
        inputs = {
            name: what
            for group in ("required", "optional")
            for name, what in known[kind]["input"].get(group, {}).items()
        }
        given = {name: value for name, value in node["inputs"].items() if name in inputs}  # an older one knows fewer
        node["inputs"] = {name: default(what) for name, what in inputs.items() if default(what) is not None} | given
    asked = Request(f"{url}/prompt", json.dumps({"prompt": graph}).encode())
    try:
        with urlopen(asked) as answer:
            return str(json.load(answer)["prompt_id"])
    except HTTPError as refusal:
        said = [error["details"] for node in json.load(refusal)["node_errors"].values() for error in node["errors"]]
        raise HollowError(f"ComfyUI refuses the graph: {', '.join(said)}.") from refusal


def default(what: list[Any]) -> Any:
    """Of an input as ComfyUI describes it; None where it is a wire."""
    kind, *others = what
    said = others[0] if others else {}
    choices = kind if isinstance(kind, list) else said.get("options", [None])
    return said.get("default", choices[0] if choices else None)


def get(url: str, path: str) -> Any:
    """What the server answers."""
    try:
        with urlopen(f"{url}/{path}") as answer:
            return json.load(answer)
    except (URLError, ConnectionError):  # it has ended
        return {}


def loaders(options: argparse.Namespace) -> Graph:
    """MODEL of "unet", CLIP of "clip", LATENT of "latents"."""
    clip: dict[str, Any] = {"class_type": "CLIPLoader", "inputs": {"clip_name": "0.safetensors"}}
    if options.layout == "sdxl":
        names = {"clip_name1": "0.safetensors", "clip_name2": "1.safetensors"}
        clip = {"class_type": "DualCLIPLoader", "inputs": names | {"type": "sdxl"}}
    return {
        "unet": {"class_type": "UNETLoader", "inputs": {"unet_name": "unet.safetensors"}},
        "clip": clip,
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": "vae.safetensors"}},
        "picture": {"class_type": "LoadImage", "inputs": {"image": "picture.png"}},
        "latents": {"class_type": "VAEEncode", "inputs": {"pixels": ["picture", 0], "vae": ["vae", 0]}},
    }


def built_in(options: argparse.Namespace, steps: int) -> Graph:
    """ComfyUI's own Train LoRA, which trains all layers, norms and biases too."""
    given = {
        "model": ["unet", 0],
        "latents": ["latents", 0],
        "positive": ["prompt", 0],
        "batch_size": 1,
        "grad_accumulation_steps": 1,
        "steps": steps,
        "learning_rate": 1e-4,
        "rank": options.rank,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "training_dtype": options.precision,
        "lora_dtype": "fp32",
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
    }
    return loaders(options) | {
        "prompt": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": PROMPT}},
        "train": {"class_type": "TrainLoraNode", "inputs": given},
        "save": {"class_type": "SaveLoRA", "inputs": {"lora": ["train", 0]}},
    }


def hollowed(layers: str, options: argparse.Namespace, steps: int) -> Graph:
    """Hollow's nodes at cut 3."""
    stored = {"latents": ["latents", 0], "personal": ["prompt", 0], "generic": ["prompt", 1], "samples": RECORDS}
    given = {
        "activations": ["precompute", 0],
        "rank": options.rank,
        "steps": steps,
        "learning_rate": 1e-4,
        "precision": options.precision,
        "gradient_checkpointing": False,
        "preview_every": 0,
        "layers": layers,
    }
    return loaders(options) | {
        "prompt": {"class_type": "HollowSplitPrompt", "inputs": {"clip": ["clip", 0], "text": PROMPT}},
        "hollow": {"class_type": "HollowUNet", "inputs": {"model": ["unet", 0], "cut": 3}},
        "precompute": {"class_type": "HollowPrecompute", "inputs": {"hollow_unet": ["hollow", 0]} | stored},
        "train": {"class_type": "HollowTrainLoRA", "inputs": {"hollow_unet": ["hollow", 0]} | given},
        "save": {"class_type": "SaveLoRA", "inputs": {"lora": ["train", 1]}},
    }


PEERS: dict[str, Callable[[argparse.Namespace, int, Path], Cost]] = {
    "ComfyUI's Train LoRA": partial(in_comfyui, built_in),
    "diffusers' script": script,
    "Hollow's nodes, all layers, k=3": partial(in_comfyui, partial(hollowed, "all layers")),
    "Hollow's nodes, k=3": partial(in_comfyui, partial(hollowed, "attention")),
    "hollow train, plain": partial(hollow, -1),
    "hollow train, k=3": partial(hollow, 3),
}


if __name__ == "__main__":
    main()
