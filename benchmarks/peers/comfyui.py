"""Those that are nodes: their graphs, in a ComfyUI of its own."""

import argparse
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from hollow_core.errors import HollowError

from .cost import GPU, Cost, gpu_bytes, process, watched
from .prepare import PROMPT, RECORDS, TEXT_ENCODER

ROOT = Path(__file__).parents[2]
ON_CPU = ["--cpu", "--use-pytorch-cross-attention"]  # which ComfyUI takes by itself on a GPU only
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
        watched(running, lambda: "To see the GUI" in log.read_text(encoding="utf-8", errors="replace"), log, before)
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
